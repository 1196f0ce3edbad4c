// SPDX-License-Identifier: Apache-2.0
// `cpu_memory.py`'s allocator: blocks that tensors free are kept for the next ones.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <vector>

namespace {

constexpr size_t HEADER = 64;        // before the data: the block's size, 0 for a small one
constexpr size_t SMALL = 256 << 10;  // up to here the allocator that torch comes with is as good
constexpr size_t PAGE = 64 << 10;    // sizes are multiples of it
constexpr size_t SPARE_SHARE = 8;    // of a block, and of the most that was in use: so much more may be held

struct Block {
  char* start;
  size_t size;
};

class Keeping final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    void* data = size == 0 ? nullptr : start_of(size) + HEADER;
    return {data, data, &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }

  // All that is idle goes back to the system.
  void trim() {
    const std::lock_guard<std::mutex> lock(mutex_);
    unmap_down_to(0);
  }

 private:
  char* start_of(size_t size) {
    char* start;
    size_t kept = 0;
    if (size <= SMALL) {
      start = static_cast<char*>(c10::GetDefaultCPUAllocator()->raw_allocate(size + HEADER));
    } else {
      const Block block = large((size + HEADER + PAGE - 1) / PAGE * PAGE);
      start = block.start;
      kept = block.size;
    }
    std::memcpy(start, &kept, sizeof kept);
    return start;
  }

  Block large(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = idle_.end();  // the smallest that fits, of these the one freed last: more of it is in the caches
    for (auto block = idle_.begin(); block != idle_.end(); ++block)
      if (block->size >= size && block->size <= size + size / SPARE_SHARE &&
          (best == idle_.end() || block->size <= best->size))
        best = block;
    Block block{nullptr, size};
    if (best != idle_.end()) {
      block = *best;
      idle_.erase(best);
      idle_bytes_ -= block.size;
    } else {
      const size_t most = std::max(peak_bytes_, used_bytes_ + size);
      unmap_down_to(most + most / SPARE_SHARE - used_bytes_ - size);
      block.start = map(size);
      if (!block.start) {
        unmap_down_to(0);
        block.start = map(size);
      }
      TORCH_CHECK(block.start, "not enough memory: you tried to allocate ", size, " bytes.");
    }
    used_bytes_ += block.size;
    peak_bytes_ = std::max(peak_bytes_, used_bytes_);
    return block;
  }

  static char* map(size_t size) {
    void* start = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return start == MAP_FAILED ? nullptr : static_cast<char*>(start);
  }

  // The blocks that have been idle for longest, until no more than so many bytes are.
  void unmap_down_to(size_t bytes) {
    size_t number = 0;
    for (; number < idle_.size() && idle_bytes_ > bytes; ++number) {
      munmap(idle_[number].start, idle_[number].size);
      idle_bytes_ -= idle_[number].size;
    }
    idle_.erase(idle_.begin(), idle_.begin() + static_cast<std::ptrdiff_t>(number));
  }

  static void give_back(void* data);

  std::mutex mutex_;
  std::vector<Block> idle_;  // in the order in which they were freed
  size_t idle_bytes_ = 0, used_bytes_ = 0, peak_bytes_ = 0;
};

Keeping* const keeping = new Keeping;  // never deleted: tensors may outlive everything else

void Keeping::give_back(void* data) {
  if (!data) return;
  Block block{static_cast<char*>(data) - HEADER, 0};
  std::memcpy(&block.size, block.start, sizeof block.size);
  if (block.size == 0) {
    c10::GetDefaultCPUAllocator()->raw_deallocate(block.start);
    return;
  }
  const std::lock_guard<std::mutex> lock(keeping->mutex_);
  keeping->used_bytes_ -= block.size;
  keeping->idle_bytes_ += block.size;
  keeping->idle_.push_back(block);
}

}  // namespace

extern "C" {
void keep_freed_memory() { c10::SetCPUAllocator(keeping, 1); }
void trim() { keeping->trim(); }
}

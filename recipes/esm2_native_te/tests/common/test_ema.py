# SPDX-License-Identifier: Apache-2.0
"""The average is what the formula says, under any strategy, and a model that had it gets its own weights back."""

import copy
from contextlib import suppress
from typing import NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from common.contract.ranks import call_on_ranks
from common.ema import EMA, swap
from common.step_folder import has_own_offsets


DECAY, STEPS = 0.6, 6
WAYS = ("ddp", "fsdp2", "fsdp2 bf16", "mfsdp", "mfsdp bf16")


class Output(NamedTuple):
    loss: torch.Tensor


class Block(nn.Module):
    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__()
        self.linear = nn.Linear(width, width, dtype=dtype)

    def forward(self, x):
        return x + self.linear(x).relu()


class Net(nn.Module):
    """Uneven for two ranks, with a frozen weight, a tied one, and a buffer that moves."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.first = nn.Linear(5, 7, dtype=dtype)
        self.blocks = nn.ModuleList([Block(7, dtype) for _ in range(2)])
        self.last = nn.Linear(7, 3, dtype=dtype)
        self.frozen = nn.Linear(3, 3, dtype=dtype).requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float32))

    def forward(self, x):
        if self.training:
            self.calls += 1
        for block in (self.first, *self.blocks, self.last, self.frozen):
            x = block(x)
        return Output((x.float() - 3).square().mean())


def new_net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(1)
    return Net(dtype)


def inputs(step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(dtype)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be split, unevenly too."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    if has_own_offsets(tensor):
        parts = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, tensor._local_tensor.detach())
        return torch.cat([part for part in parts if part.numel()]).reshape(tensor.shape)
    return tensor.detach().full_tensor()


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    model = getattr(model, "module", model)
    return {name: full(p) for name, p in model.named_parameters() if p.requires_grad}


def distribute(model: Net, way: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """As the three trainers do."""
    way, _, bf16 = way.partition(" ")
    dtype = torch.bfloat16 if bf16 else None
    if way == "fsdp2":
        for part in (*model.blocks, model):
            fully_shard(part, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    elif way == "mfsdp":
        from megatron_fsdp import MixedPrecisionPolicy as MegatronPolicy
        from megatron_fsdp import fully_shard_model

        from common.megatron_fsdp_cpu import stand_in_for_cuda
        from common.megatron_fsdp_exact import compute_in

        stand_in_for_cuda()
        model = fully_shard_model(
            compute_in(dtype, model),
            device_mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(), 1), mesh_dim_names=("dp", "tp")),
            dp_shard_dim="dp",
            tp_dim="tp",
            fsdp_unit_modules=[Block],
            device=torch.device("cpu"),
            calculate_per_token_loss=True,
            mixed_precision_policy=MegatronPolicy(main_params_dtype=torch.float32, main_grads_dtype=torch.float32),
            preproc_state_dict_for_dcp_ckpt=False,
        )
    elif way == "ddp":
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    if way == "mfsdp":
        from common.megatron_fsdp_exact import make_exact

        make_exact(model, optimizer)
    return model, optimizer


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    dtype = torch.bfloat16 if getattr(model, "in_bf16", False) else torch.float32
    loss = model(inputs(step, dtype)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def validate(model: nn.Module) -> float:
    model.eval()
    dtype = torch.bfloat16 if getattr(model, "in_bf16", False) else torch.float32
    loss = model(inputs(99, dtype)).loss.item()
    model.train()
    return loss


def by_formula(weights: list[dict[str, torch.Tensor]], decay: float = DECAY) -> dict[str, torch.Tensor]:
    """The first of `weights` are those before any step."""
    averages = {name: weight.double() for name, weight in weights[0].items()}
    for n, now in enumerate(weights[1:], start=1):
        d = min(decay, (1 + n) / (10 + n))
        averages = {name: d * average + (1 - d) * now[name].double() for name, average in averages.items()}
    return averages


# ---- in one process


@pytest.mark.parametrize("decay", [0.1, 0.5, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_formula(decay, dtype):
    model = new_net(dtype)
    ema, weights = EMA(model, decay), [trained(model)]
    for step in range(30):
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        ema.update(model)
        weights.append(trained(model))
    assert ema.tensors().keys() == weights[0].keys() and "frozen.weight" not in ema.tensors()
    for name, average in by_formula(weights, decay).items():
        assert ema.tensors()[name].dtype == dtype
        torch.testing.assert_close(ema.tensors()[name].double(), average, rtol=1e-5, atol=1e-6)
        assert not torch.equal(ema.tensors()[name], dict(model.named_parameters())[name])


def test_without_a_decay_it_does_nothing():
    model = new_net()
    ema, before = EMA(model, None), trained(model)
    ema.update(model)
    with ema.applied(model):
        assert_same(trained(model), before)
    ema.load_state_dict({"num_updates": 3, "decay": 0.9}, model)
    assert ema.tensors() == {} == ema.state_dict() and not ema.enabled


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """To the bit."""
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


class Failure(Exception):
    pass


@pytest.mark.parametrize("failing", [False, True])
def test_applied_and_put_back_to_the_bit(failing):
    model = new_net()
    ema = EMA(model, DECAY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(3):
        train_step(model, optimizer, step)
        ema.update(model)
    own, averages = trained(model), copy.deepcopy(ema.tensors())
    with suppress(Failure), ema.applied(model):
        assert_same(trained(model), averages)
        expected = new_net()
        expected.load_state_dict(averages, strict=False)
        assert validate(model) == validate(expected)
        if failing:
            raise Failure
    assert_same(trained(model), own)
    assert_same(ema.tensors(), averages)


def test_a_failure_half_way_in_puts_all_back(monkeypatch):
    model = new_net()
    ema = EMA(model, DECAY)
    train_step(model, torch.optim.SGD(model.parameters(), lr=1), 0)
    own, averages, calls = trained(model), copy.deepcopy(ema.tensors()), []

    def failing_once(*pair):
        calls.append(pair)
        if len(calls) == 4:
            raise Failure
        swap(*pair)

    monkeypatch.setattr("common.ema.swap", failing_once)
    with pytest.raises(Failure), ema.applied(model):
        raise AssertionError
    assert_same(trained(model), own)
    assert_same(ema.tensors(), averages)


def test_an_update_is_one_operation_and_asks_the_device_for_nothing():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    model = new_net()
    ema = EMA(model, DECAY)
    with Watch():
        ema.update(model)
    assert [name for name in seen if name != "detach"] == ["_foreach_lerp_"]


def test_state():
    model = new_net()
    ema = EMA(model, DECAY)
    for _ in range(3):
        ema.update(model)
    assert ema.state_dict() == {"num_updates": 3, "decay": DECAY}
    resumed = EMA(model, DECAY)
    resumed.load_state_dict(ema.state_dict(), model)
    assert resumed.num_updates == 3
    with torch.no_grad():
        model.last.bias.fill_(7)
    resumed.load_state_dict({}, model)  # a checkpoint without an average: it begins at what was loaded
    assert resumed.num_updates == 0
    assert_same(resumed.tensors(), trained(model))


# ---- on ranks


def run(distributed, way: str, folder=None) -> dict:
    """Train with validations on the average, and once without; what came of it."""
    found = {}
    for validated in (False, True):
        model, optimizer = distribute(new_net(), way)
        model.in_bf16 = way.endswith("bf16")
        ema, weights, losses = EMA(model, DECAY), [trained(model)], []
        for step in range(STEPS):
            losses.append(train_step(model, optimizer, step))
            ema.update(model)
            weights.append(trained(model))
            if validated:
                own = validate(model)  # which leaves FSDP2's root gathered
                with ema.applied(model):
                    swapped = trained(model)
                    found["validation"] = validate(model)
                    assert found["validation"] != own
                assert_same(trained(model), weights[-1])
                with suppress(Failure), ema.applied(model):
                    validate(model)
                    raise Failure
        averages = {name: full(tensor) for name, tensor in ema.tensors().items()}
        found[validated] = {"losses": losses, "weights": weights[-1], "averages": averages}
        if validated:
            assert_same(swapped, averages)
    for name, average in by_formula(weights).items():
        torch.testing.assert_close(averages[name].double(), average, rtol=1e-6, atol=1e-7)
    parameters = dict(getattr(model, "module", model).named_parameters())
    for name, tensor in ema.tensors().items():
        assert isinstance(tensor, DTensor) == isinstance(parameters[name], DTensor) == (way != "ddp")
        if way != "ddp":
            assert tensor.placements == parameters[name].placements and tensor.shape == parameters[name].shape
    if folder:
        dcp.save({"ema": ema.tensors()}, checkpoint_id=folder)
    return found | {"model": averages}


def run_all(distributed, folder) -> dict[str, dict]:
    """By way; Megatron-FSDP, which leaves its stand-ins behind, is last."""
    return {way: run(distributed, way, folder / way) for way in WAYS}


def read(distributed, reader: str, folder) -> dict[str, dict[str, torch.Tensor]]:
    """The averages of each way's checkpoint on these ranks."""
    model, _ = distribute(new_net(), reader)
    ema, found = EMA(model, DECAY), {}
    for way in WAYS:
        dcp.load({"ema": ema.tensors()}, checkpoint_id=folder / way)
        found[way] = {name: full(tensor) for name, tensor in ema.tensors().items()}
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> tuple[list[dict], list[dict]]:
    """What each of two ranks found, and what others read of the checkpoints."""
    path = tmp_path_factory.mktemp("ranks")
    found = call_on_ranks(path / "two", run_all, 2, path)
    readers = (("ddp", 1), ("fsdp2", 3), ("mfsdp", 2))
    return found, [call_on_ranks(path / f"by {reader}", read, num, reader, path)[0] for reader, num in readers]


@pytest.fixture(scope="module")
def plain() -> dict:
    """One process, no strategy, the formula."""
    model = new_net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    weights, losses = [trained(model)], []
    for step in range(STEPS):
        losses.append(train_step(model, optimizer, step))
        weights.append(trained(model))
    averages, own = by_formula(weights), validate(model)
    model.load_state_dict({name: x.float() for name, x in averages.items()}, strict=False)
    return {"losses": losses, "averages": averages, "own": own, "validation": validate(model)}


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks(way, plain, two_ranks):
    found, other = (rank[way] for rank in two_ranks[0])
    exact = not way.endswith("bf16")
    close = {"rtol": 1e-4, "atol": 1e-5} if exact else {"rtol": 0.2, "atol": 0.05}
    for key in ("losses", "weights", "averages"):  # a validation on the average leaves no trace
        same(found[True][key], found[False][key])
        same(found[True][key], other[True][key])
    torch.testing.assert_close(found[True]["losses"], plain["losses"], **close)
    assert abs(found["validation"] - plain["validation"]) < 0.1 * abs(plain["own"] - plain["validation"])
    torch.testing.assert_close(found["validation"], plain["validation"], **close)
    for name, average in plain["averages"].items():
        torch.testing.assert_close(found[True]["averages"][name].double(), average, **close)
    for reader in two_ranks[1]:
        assert_same(reader[way], found[True]["averages"])


def same(one, other) -> None:
    """To the bit."""
    if isinstance(one, dict):
        assert_same(one, other)
    else:
        assert one == other

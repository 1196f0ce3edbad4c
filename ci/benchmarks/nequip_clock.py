# SPDX-License-Identifier: Apache-2.0
"""For `nequip-train`: says each validation's mean absolute error of forces, in the words of train_ddp.py."""

from lightning import Callback, LightningModule, Trainer


class Clock(Callback):
    """The trainer makes a validation of a few batches before the first step, which does not count."""

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """A line of the output; who reads it has the time."""
        if not trainer.sanity_checking:
            mae = float(trainer.callback_metrics["val0_epoch/forces_mae"])
            print(f"step {trainer.global_step}  validation forces_mae {mae:.6f}", flush=True)

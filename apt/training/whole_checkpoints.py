"""A `transformers.Trainer` that shows a checkpoint under its name only when all of it is on the disk."""

import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from apt.files import publish_folder

PARTIAL = "checkpoint.partial"  # where a checkpoint is written before it gets its name


class WholeCheckpoints(Trainer):
    """Writes checkpoints under a temporary name, then renames them: a kill meanwhile loses none that is there."""

    _staging: Path | None = None  # stands in for the output folder while a checkpoint is written

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._staging = folder / PARTIAL
        shutil.rmtree(self._staging, ignore_errors=True)
        try:
            super()._save_checkpoint(model, trial)
            written = self._staging / name
            best = self.state.best_model_checkpoint
            if best is not None and Path(best) == written:  # also in the state that is saved
                self.state.best_model_checkpoint = str(folder / name)
                self.state.save_to_json(str(written / "trainer_state.json"))
        finally:
            self._staging = None
        publish_folder(written, folder / name)
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))
        rotate_checkpoints(
            output_dir=str(folder),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else its name is still to come
            super()._push_from_checkpoint(checkpoint_folder)

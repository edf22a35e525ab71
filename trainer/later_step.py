"""What the steps t >= 1 of every method share: a teacher, a new classifier, a memory."""

from collections.abc import Callable

import torch

from data_loader.dataset import TrainDataset
from data_loader.memory import MANIFEST
from trainer.base import Trainer
from trainer.output import mend_memory, read_model
from trainer.setup import trainable
from utils.logging import log


class LaterStep(Trainer):
    """The student starts from the model of step t-1, which stays beside it as the teacher."""

    def initialize(self, fresh: bool) -> None:
        """The teacher is the model of step t-1; the student starts from it, with a new classifier."""
        backbone, before = self.config.arch.args.backbone, self.data.step - 1
        self.teacher, checkpoint = read_model(self.previous, self.data, backbone, before)
        self.before = checkpoint.get("made_from") or {}
        if not self.config.arch.args.freeze_all_bn:
            log.warning(
                "batch normalisation is trained in this step: from step 1 on the method freezes it "
                "(--freeze_bn)"
            )
        rate = self.config.optimizer.args.lr
        if before == 0 and self.before.get("settings", {}).get("optimizer.args.lr") == rate:
            log.warning(
                f"the learning rate is {rate:g}, as at step 0: from step 1 on the method has a tenth "
                "of that (--lr)"
            )
        # whether cls.0 may be DKD's auxiliary classifier, which says nothing of the background
        self.auxiliary = checkpoint.get("format") != "eir-1" or checkpoint.get("ac", 0) != 0
        if self.config.hyperparameter.ac > 0 and not self.auxiliary:
            log.warning(
                f"{self.previous} holds a background classifier in place of DKD's auxiliary one, from "
                "which the new classifier starts (--ac): train its step with --ac too"
            )
        self.teacher.eval().requires_grad_(False)
        self.teacher.to(self.device, memory_format=torch.channels_last)
        if fresh:
            self.model.load_state_dict(self.teacher.state_dict(), strict=False)
            if self.config.hyperparameter.ac > 0:
                self._start_from_auxiliary()

    def _start_from_auxiliary(self):
        """New classifier from cls.0, as DKD does."""
        new, auxiliary = self.model.cls[-1], self.model.cls[0]
        with torch.no_grad():
            new.weight.copy_(auxiliary.weight.expand_as(new.weight))
            new.bias.copy_(auxiliary.bias.expand_as(new.bias))

    def training_set(self, seen: Callable[[], list[set[int]]] | None = None) -> TrainDataset:
        """Images of this step, then the entries of the memory, drawn unless a resumed run has it there.

        seen: as StepData.memory takes it.
        """
        folder, before = self.folder / "memory", self.previous.parent
        settings = self.config.data.memory
        anew = self.resume is None
        draws = anew or not (folder / MANIFEST).is_file()
        if draws and settings.replay != "none" and settings.mem_size:
            mend_memory(self.data, before)
        memory = self.data.memory(folder, before / "memory", anew, seen)
        return TrainDataset(self.data.training(), memory, self.config.seed)

    def parameter_groups(self) -> list[dict]:
        """As at step 0, but with weight decay on the new classifier only."""
        lr, model = self.config.optimizer.args.lr, self.model
        return [
            {"params": trainable(model.backbone), "lr": lr, "weight_decay": 0},
            {"params": trainable(model.aspp), "lr": 10 * lr, "weight_decay": 0},
            {"params": trainable(model.cls[:-1]), "lr": 10 * lr, "weight_decay": 0},
            {"params": trainable(model.cls[-1]), "lr": 10 * lr},
        ]

    @torch.no_grad()
    def teach(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of the teacher at stride 16."""
        with self.autocast():
            return self.teacher(images, upsample=False)

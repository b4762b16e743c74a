"""Annotation of scans with a MONAI Label server: settings of a click, labels by name, training on corrected scans."""

from brainfm_monai.annotation.finetuning import (
    FOLDER,
    PROGRESS,
    EpochReport,
    fine_tune,
    prepare_corrected,
    train_from_server,
)
from brainfm_monai.annotation.server import brain_uncertainty, choose, match_structures, read_label_info

__all__ = ["FOLDER", "PROGRESS", "EpochReport", "brain_uncertainty", "choose", "fine_tune", "match_structures"]
__all__ += ["prepare_corrected", "read_label_info", "train_from_server"]

"""bundle/configs/features.json over inference.json; the network is tiny and random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigWorkflow

from brainfm_monai.networks import MultiTaskNet, UNet
from brainfm_monai.tasks import TaskLayout


def test_features_of_an_oblique_scan_lie_in_its_grid(repository: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = MultiTaskNet(UNet(1, (8, 16)), TaskLayout(["segmentation", "CT"]))
    torch.save(network.state_dict(), tmp_path / "random.pt")
    affine = np.array([[-1.0, 0.1, 0, 9], [0.1, 1, 0, -20], [0, 0, 1, 3], [0, 0, 0, 1]])
    data = np.random.default_rng(0).random((20, 24, 18), dtype=np.float32)
    nib.save(nib.Nifti1Image(data, affine), tmp_path / "scan.nii.gz")
    configs = repository / "bundle/configs"
    overrides: dict[str, Any] = {
        "bundle_root": str(repository / "bundle"),
        "input": str(tmp_path / "scan.nii.gz"),
        "output_dir": str(tmp_path / "out"),
        "weights": str(tmp_path / "random.pt"),
        "device": "$torch.device('cpu')",
        "precision": "float32",
        "layout#tasks": ["segmentation", "CT"],
        "network_def#backbone": {"_target_": "brainfm_monai.networks.UNet", "features": [8, 16]},
        "network_def#stride": 1,
    }
    workflow = ConfigWorkflow(
        workflow_type="inference",
        config_file=[str(configs / "inference.json"), str(configs / "features.json")],
        meta_file=str(configs / "metadata.json"),
        logging_file=False,
        **overrides,
    )
    workflow.initialize()
    workflow.run()
    found = nib.load(tmp_path / "out/scan/scan_features.nii.gz")
    assert isinstance(found, nib.Nifti1Image)
    assert found.shape == (20, 24, 18, 8)
    np.testing.assert_allclose(found.affine, affine, atol=1e-5)
    length = np.linalg.norm(found.get_fdata(), axis=-1)
    assert length.max() <= 1 + 1e-4
    assert np.median(length) > 0.9  # 1 in the network's grid; a little less between its voxels

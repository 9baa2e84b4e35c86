"""What several tests of the trainer start from."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """The tiny policy of the built-in task, without any training."""
    from trainer.pretrain import new_model, save

    folder = tmp_path_factory.mktemp("policy")
    save(new_model(0), folder)
    return folder

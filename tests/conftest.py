import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=40, database=None)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)

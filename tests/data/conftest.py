import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_fixtures import real_cifar10

__all__ = ["real_cifar10"]

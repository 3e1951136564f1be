"""What all tests share: GPU tests skip with the reason where there is no GPU."""

import pytest
from data_fixtures import real_cifar10

from distopt.backend import gpu_status

__all__ = ["real_cifar10"]


def pytest_report_header():
    status = gpu_status()
    return f"distopt: GPU {'usable' if status.usable else 'not usable'} ({status.reason})"


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    status = gpu_status()
    if not status.usable:
        skip = pytest.mark.skip(reason=f"no usable GPU: {status.reason}")
        for item in marked:
            item.add_marker(skip)

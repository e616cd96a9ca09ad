"""setuptools' build backend, which asks for what the native part needs only where it is built."""

from native import requirements
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def get_requires_for_build_wheel(config_settings=None):
    """For `pip install .` and wheels."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *requirements()]


def get_requires_for_build_editable(config_settings=None):
    """For `pip install -e .`."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *requirements()]

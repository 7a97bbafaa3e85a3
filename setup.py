"""Computes the list of packages: the top-level rooms are installed inside `streamcl`. Everything else is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

ROOMS = ("scenarios", "strategies", "memory", "configs")


def packages(folder: str, name: str) -> list[str]:
    """A folder as the package `name`, and all below it: a sub-folder travels also where it has no __init__.py."""
    return [name, *(f"{name}.{inside}" for inside in find_namespace_packages(folder, exclude=["*__pycache__*"]))]


setup(
    packages=[*packages("streamcl", "streamcl"), *(package for room in ROOMS for package in packages(room, f"streamcl.{room}"))],
    package_dir={"streamcl": "streamcl", **{f"streamcl.{room}": room for room in ROOMS}},
)

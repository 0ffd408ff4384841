"""The kernels of dispatch tables as a project of their own: plain CUDA C++, a C header, a build and tests."""

from tuner.standalone.project import export_standalone

__all__ = ["export_standalone"]

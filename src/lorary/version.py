"""The version, in one place: read by the build, the command line and every provenance file."""

__version__ = "0.1.0"

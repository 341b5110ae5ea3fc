"""A model in, a bundle out: topology, partition, trace, build, verify."""

from exporter.build import build
from exporter.errors import BuildError, SourceError
from exporter.graph.partition import partition
from exporter.graph.topology import topology
from exporter.options import BuildOptions
from exporter.verification.verify import verify

__all__ = ["BuildError", "BuildOptions", "SourceError", "build", "partition", "topology", "verify"]

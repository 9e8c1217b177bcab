"""matryoshka-pipeline: one YAML job spec in, a measured multi-resolution search index out."""

from pipeline.errors import PipelineError
from pipeline.run import run
from pipeline.search import Index, open_index
from pipeline.spec import JobSpec

__all__ = ["Index", "JobSpec", "PipelineError", "open_index", "run"]

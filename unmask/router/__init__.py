"""Find the engine that answers for a model id, and check that its vectors are right."""

from unmask.router.catalogue_sync import CatalogueSync, retired_models, sources_of_answering_models
from unmask.router.registry import ModelRegistry
from unmask.router.served_model import ModelOptions, ServedModel

__all__ = [
    "CatalogueSync",
    "ModelOptions",
    "ModelRegistry",
    "ServedModel",
    "retired_models",
    "sources_of_answering_models",
]

"""Find who answers for a model id, this process or a provider, and check that the vectors are right."""

from unmask.router.catalogue_sync import CatalogueSync, retired_models, sources_of_answering_models
from unmask.router.choosing import ProviderPreferences
from unmask.router.embedding_work import EmbeddingWork
from unmask.router.pool import ProviderPool
from unmask.router.public_names import PublicNames
from unmask.router.registry import ModelRegistry
from unmask.router.route import ModelRoute, find_route
from unmask.router.served_model import ModelOptions, ServedModel

__all__ = [
    "CatalogueSync",
    "EmbeddingWork",
    "ModelOptions",
    "ModelRegistry",
    "ModelRoute",
    "ProviderPool",
    "ProviderPreferences",
    "PublicNames",
    "ServedModel",
    "find_route",
    "retired_models",
    "sources_of_answering_models",
]

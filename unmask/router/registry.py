"""`ModelRegistry`: the models that this process serves, by id and alias."""

import asyncio
import logging
from collections.abc import Mapping, Sequence

from unmask.catalogue import Catalogue, Record
from unmask.encoder import require_device
from unmask.errors import UnmaskError, UsageError
from unmask.router.pool import ProviderPool
from unmask.router.public_names import PublicNames
from unmask.router.served_model import ModelOptions, ServedModel

log = logging.getLogger("unmask")


class ModelRegistry:
    """All models that this process serves, and the catalogue of their records.

    Args:
        names: ids, folders or files of the models to serve; the first is listed first.
        warm: those of them to load at start rather than on first use.
        options: precision, device, queue and cache of every model.
        catalogue: the records; None for the shipped ones. Served models that it lacks are added to it.
        sources: model id -> place of its weights, for models whose id does not say it.

    Attributes:
        providers: providers of models elsewhere; None for none.

    Raises:
        UsageError: two models share a name, a warm one is not among `names`, or the device is not available.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        warm: Sequence[str] = (),
        options: ModelOptions | None = None,
        catalogue: Catalogue | None = None,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        self._options = options or ModelOptions()
        if self._options.replicas is None:  # replicas check it where they are
            require_device(self._options.device, self._options.dtype)
        self.catalogue = catalogue or Catalogue.shipped()
        self.providers: ProviderPool | None = None
        self._models: list[ServedModel] = []
        self._by_name: dict[str, ServedModel] = {}
        for name in dict.fromkeys(names):
            entry = self.catalogue.get(name)
            record = entry.record if entry is not None and entry.record.id == name else None
            self.add((sources or {}).get(name, name), record)
        self._warm = [self._warm_model(name) for name in dict.fromkeys(warm)]

    def add(self, source: str, record: Record | None = None) -> ServedModel:
        """Serve one more model from now on. It is loaded with its first request.

        Args:
            source: place of its weights.
            record: its record; None for the shipped one, or one made from its name.

        Raises:
            UsageError: another model has its name.
        """
        model = ServedModel(source, record, self._options, self.catalogue, self._is_remote, self._has_providers)
        names = (model.record.id, *model.record.aliases)
        if taken := next((name for name in names if name in self._by_name), None):
            raise UsageError(f"two models would both be called {taken!r}; rename the folder of one of them")
        if self.catalogue.get(model.record.id) is None:
            self.catalogue.put(model.record)
        self._models = [*self._models, model]
        self._by_name |= dict.fromkeys(names, model)
        return model

    def remove(self, id: str) -> ServedModel | None:
        """Stop serving a model and return it, to be closed after its last request; None if there is no such model."""
        model = self._by_name.get(id)
        if model is not None:
            self._models = [other for other in self._models if other is not model]
            self._warm = [other for other in self._warm if other is not model]
            self._by_name = {name: other for name, other in self._by_name.items() if other is not model}
        return model

    def _warm_model(self, name: str) -> ServedModel:
        model = self.find(name) or next((model for model in self._models if model.source == name), None)
        if model is None:
            raise UsageError(f"{name} is to be warmed but is not among the served models")
        return model

    @property
    def public_names(self) -> PublicNames:
        """The names by which callers know the providers."""
        return self.providers.public_names if self.providers is not None else PublicNames()

    def list(self) -> list[ServedModel]:
        """Return all models in the order of the command line."""
        return list(self._models)

    def find(self, id: str) -> ServedModel | None:
        """Return the model with this id or alias, or None."""
        return self._by_name.get(id)

    def preload(self) -> None:
        """Begin to load the warm models in threads, while the rest of the process is still being built."""
        for model in self._loaded_here():
            model.preload()

    async def start_loading(self) -> None:
        """Begin to load those warm models that `preload` has not begun, without waiting for any."""
        for model in self._loaded_here():
            try:
                await model.engine()
            except UnmaskError as error:
                log.info("%s", error)

    def renew(self) -> None:
        """Let each loaded model look for another revision in its files, in the background. Needs an event loop."""
        for model in self._models:
            if self.providers is not None and self.providers.of_model(model.record.id) is not None:
                log.warning(
                    "%s keeps its revision, which its providers are checked against: restart the server for another",
                    model.record.id,
                )
            else:
                model.renew_in_background()

    async def lose_cluster(self, fault: str, grace: float) -> None:
        """Answer for no model of replicas until `find_cluster`: providers do, where there are any."""
        used = [model for model in self._models if model.state != "remote"]
        await asyncio.gather(*(model.lose_replicas(fault, grace) for model in used))

    def find_cluster(self) -> None:
        """Load the models again that were loaded when the cluster was lost."""
        for model in self._models:
            if model.is_lost:
                model.find_replicas()

    def _loaded_here(self) -> Sequence[ServedModel]:
        """Return the warm models without those that only providers answer for."""
        return [model for model in self._warm if not self._is_remote(model.record.id)]

    def _is_remote(self, id: str) -> bool:
        return self.providers is not None and self.providers.is_remote_only(id)

    def _has_providers(self, id: str) -> bool:
        return self.providers is not None and bool(self.providers.settings.of_model(id))

    async def canaries(self) -> dict[str, str]:
        """Return for each model that is warm, loaded or has providers "ok", or the reason why it cannot answer."""
        warm = self._loaded_here()
        models = [model for model in self._models if model in warm or model.state not in ("cold", "remote")]
        verdicts = await asyncio.gather(*(model.canary() for model in models))
        by_id = {model.record.id: verdict for model, verdict in zip(models, verdicts, strict=True)}
        groups = self.providers.models() if self.providers is not None else {}
        # A model that is not loaded here is ready if a provider's canaries were right.
        for id, group in groups.items():
            if by_id.get(id) != "ok" and self.find(id) is not None:
                by_id[id] = "ok" if group.any_admitted() else by_id.get(id, "no provider is admitted")
        return by_id

    async def close(self, grace: float = 30.0) -> None:
        """Finish accepted requests within `grace` seconds, then stop every engine."""
        await asyncio.gather(*(model.close(grace) for model in self._models))
        if self.providers is not None:
            await self.providers.close()

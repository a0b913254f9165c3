"""Several denoisers over one context tower.

The model owns the context tower and, of each denoiser, the parts that the context tower lacks (`DenoiserParts`). A
model with one of these denoisers alone is a view (`TwoTowerModel.with_denoiser`): it shares every weight. Two sets of
adapters act on the same weights, so a view with adapters has modules of its own that share the parameters of the
context tower. No pass changes a module, so passes of different denoisers may follow each other in any order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from operator import eq
from typing import TypeVar

import torch
from torch import nn

from twotower.config import GenericTwoTowerConfig, TwoTowerConfig
from twotower.errors import ArgumentError, ConfigError
from twotower.families.denoiser import denoiser_of
from twotower.model.adapters import LowRank, MaskEmbedding
from twotower.model.conditioning import TimeConditioning
from twotower.model.draft_head import DraftHead
from twotower.model.tower import Tower
from twotower.specs import TowerSpec

Part = TypeVar("Part", bound=nn.Module)
Model = TypeVar("Model", bound=nn.Module)
OF_ADAPTERS = (LowRank, MaskEmbedding, DraftHead)


def check_one_device(context: str | torch.device, denoiser: str | torch.device) -> None:
    """Raises ArgumentError if the devices of a model with adapters differ."""
    if torch.device(context) != torch.device(denoiser):
        raise ArgumentError(
            f"denoiser device is {denoiser} and context device {context}, and this model's denoiser is adapters on the "
            "context tower; give one device",
            param="denoiser_device",
        )


def tower_of(config: TwoTowerConfig, context: TowerSpec) -> Tower:
    """The denoiser tower of a configuration, with random weights, and its draft head if it has one."""
    tower = Tower(denoiser_of(config, context))
    _add_draft_head(tower, config)
    return tower


def add_adapters(tower: Tower, config: TwoTowerConfig) -> None:
    """Adds the adapters of a configuration to a tower, and its draft head if it has one.

    Raises:
        ConfigError: the backbone has LongRoPE.
    """
    own = config.denoiser
    assert own.adapters is not None
    if tower.spec.original_length is not None:
        raise ConfigError(
            "config: adapters are not supported with LongRoPE, whose rotary embedding depends on the length of "
            "the text; make a denoiser tower: twotower init --denoiser tower"
        )
    tower.add_adapters(own.adapters.rank, config.mask_token)
    _add_draft_head(tower, config)


def _add_draft_head(tower: Tower, config: TwoTowerConfig) -> None:
    if config.denoiser.draft_head is not None:
        tower.add_draft_head(config.denoiser.draft_head.rank)


class DenoiserParts(nn.Module):
    """The parts of one denoiser of several: a tower and its time conditioning, or adapters.

    Names of tensors are those in a model with this denoiser alone. context: the adapters, at their places in the
    context tower.
    """

    def __init__(self, config: TwoTowerConfig, context: Tower) -> None:
        """config: of the model with this denoiser alone. context: its context tower."""
        super().__init__()
        self.denoiser: Tower | None = None
        self.time: TimeConditioning | None = None
        self.context: nn.Module | None = None
        if config.denoiser.adapters is None:
            self.denoiser = tower_of(config, context.spec)
            spec = self.denoiser.spec
            self.time = TimeConditioning(spec.hidden_size, spec.num_layers)
        else:
            tower = shared(context)
            add_adapters(tower, config)
            self.context = _places(tower)

    def on(self, context: Tower) -> Tower:
        """The context tower of the model with this denoiser alone: the given one, or one that shares its weights."""
        if self.context is None:
            return context
        tower = shared(context)
        for path, part in _of_adapters(self.context):
            parent, _, name = path.rpartition(".")
            setattr(tower.get_submodule(parent), name, part)
        return tower

    def reset_adapters(self, std: float) -> None:
        """Sets random weights of adapters. std: of the embedding of the mask token."""
        for _, part in () if self.context is None else _of_adapters(self.context):
            if isinstance(part, MaskEmbedding):
                nn.init.normal_(part.weight, std=std)
            else:
                part.reset_parameters()


def several_denoisers(config: TwoTowerConfig, context: Tower, wanted: bool) -> nn.ModuleList:
    """The parts of several denoisers, in the order of their names; none if there is one, or if they are not wanted."""
    if config.denoisers is None or not wanted:
        return nn.ModuleList()
    assert isinstance(config, GenericTwoTowerConfig)
    return nn.ModuleList(DenoiserParts(config.with_denoiser(name), context) for name in config.denoisers.names)


def parts_of(denoisers: nn.ModuleList) -> list[DenoiserParts]:
    """The members of `several_denoisers`, with their type."""
    return [part for part in denoisers if isinstance(part, DenoiserParts)]


class Views:
    """The models with one of several denoisers alone, made on demand, in any thread. A copy or pickle is empty."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[nn.Module, Structure]] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Views], tuple[()]]:
        return Views, ()

    def of(self, model: Model, name: str, prepare: Callable[[Model], None]) -> Model:
        """The view of a model with the denoiser of this name, made anew if modules were replaced.

        prepare: called with a new view. An engine may still use an old one, which therefore keeps its data.
        """
        with self._lock:
            view, structure = self._made.get(name, (None, None))
            if structure is None or not structure.is_current():
                view = _view(model, name)
                prepare(view)
                self._made[name] = view, Structure(model)
        assert isinstance(view, type(model))
        return view

    def release(self) -> None:
        """Frees what the runners and the generation of views have prepared."""
        for view, _ in list(self._made.values()):
            release = view.release
            assert callable(release)
            release()

    def drop(self) -> None:
        """Forgets the views, so that modules which are about to be replaced are not kept."""
        self.release()
        with self._lock:
            self._made.clear()


def _view(model: Model, name: str) -> Model:
    config, denoisers, context = model.config, model.denoisers, model.context
    assert isinstance(config, GenericTwoTowerConfig)
    assert config.denoisers is not None
    assert isinstance(denoisers, nn.ModuleList)
    assert isinstance(context, Tower)
    parts = parts_of(denoisers)[config.denoisers.names.index(name)]
    view = object.__new__(type(model))
    view.__dict__ = {**model.__dict__, "_modules": {}}
    own = {"config": config.with_denoiser(name), "denoisers": nn.ModuleList(), "_views": Views()}
    own |= {"context": parts.on(context), "denoiser": parts.denoiser, "time": parts.time}
    for attribute, value in own.items():
        setattr(view, attribute, value)
    return view


def shared(module: Part) -> Part:
    """A module with the same parameters and buffers, whose submodules are copies in the same way.

    A change of a parameter or buffer in one is a change in both, also if it is replaced. A submodule that is added to
    one, or replaced, is not in the other.
    """
    out = object.__new__(type(module))
    out.__dict__ = {**module.__dict__, "_modules": {}}
    out._modules.update({name: None if part is None else shared(part) for name, part in module._modules.items()})
    return out


class Structure:
    """The modules of a model at one moment."""

    def __init__(self, model: nn.Module) -> None:
        self._children = [module._modules for module in model.modules()]
        self._known = [dict(children) for children in self._children]

    def is_current(self) -> bool:
        """Whether the model still has the same modules: quantization, for example, replaces some."""
        return all(map(eq, self._children, self._known))


def _of_adapters(tree: nn.Module) -> Iterator[tuple[str, LowRank | MaskEmbedding | DraftHead]]:
    for path, part in tree.named_modules():
        if isinstance(part, OF_ADAPTERS):
            yield path, part


def _places(tower: Tower) -> nn.Module:
    """The adapters of a tower in modules of the same names, which have nothing else."""
    tree = nn.Module()
    for path, part in _of_adapters(tower):
        *parents, name = path.split(".")
        place = tree
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, nn.Module())
            place = place.get_submodule(parent)
        place.add_module(name, part)
    return tree

"""Load an engine from a checkpoint of another number of ranks or ZeRO stage: weights, moments, buffers.

DeepSpeed's files hold flat tensors, cut into one part per rank: at ZeRO 1 and 2 those of a whole parameter
group, at ZeRO 3 each parameter alone. `SavedEngine` finds every parameter in them; `load_resharded` gives an
engine its own parts. No number is computed, so every value stays bit for bit what was saved.
"""

import pkgutil
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from open_unitok.core import distributed
from open_unitok.core.errors import UserError

from .integrity import DEEPSPEED_TYPES

WEIGHT = "fp32"  # the key of the weights themselves, beside the optimizer's ("exp_avg", ...)
PARAMETER_NAMES = "unitok_parameter_names"  # in the files of ZeRO 0: names in the order of the groups


class _Piece(NamedTuple):
    """Elements start ... start + length of a flattened parameter: a part of a flat tensor in the files."""

    start: int
    length: int
    values: dict[str, Any]  # WEIGHT and the optimizer's keys -> flat tensor, or a number as "step"
    offset: int  # in those flat tensors


class SavedEngine:
    """Weights and optimizer states of an engine in a checkpoint, by the names of its parameters.

    Files are memory-mapped: only what is read is loaded.

    Attributes:
        stage: ZeRO stage that wrote it; ranks: their number.
        model: the rest of DeepSpeed's state ("global_steps", "module", "buffer_names", ...).
        shapes: name -> shape of every parameter whose weights are in the files.
        trained: names of those with optimizer states; None if the files do not tell.

    Raises:
        UserError: a file is missing.
    """

    def __init__(self, folder: Path):
        models = _by_rank(folder, "*model_states.pt")
        states = _by_rank(folder, "*optim_states.pt")
        if not models:
            raise UserError(f"{folder} holds no state of an engine: name another checkpoint.")
        self.model = models[0]
        self.ranks = int(self.model["dp_world_size"])
        whole = {
            name: tensor
            for name, tensor in self.model["module"].items()
            if name not in self.model["buffer_names"] and tensor.numel()
        }
        self.shapes: dict[str, torch.Size] = {}
        self._pieces: dict[str, list[_Piece]] = defaultdict(list)
        flats = [state["optimizer_state_dict"] for state in states]
        self.stage = int(flats[0]["zero_stage"]) if flats else 0
        counts = {0: (1, 0), 3: (self.ranks, self.ranks)}.get(self.stage, (1, self.ranks))
        if (len(models), len(states)) != counts:
            raise UserError(f"{folder} lacks files of some of its {self.ranks} rank(s): restore it.")
        if self.stage == 3:
            self._add_frozen_parts(models)
            self._add_parts_of_parameters(flats)
        else:
            for name, tensor in whole.items():
                self._add(name, tensor.shape, _Piece(0, tensor.numel(), {WEIGHT: tensor.reshape(-1)}, 0))
            self._add_groups(flats) if flats else self._add_whole()

    @property
    def trained(self) -> set[str] | None:
        if self.stage == 0:
            names = self.model.get(PARAMETER_NAMES)
            return None if names is None else {name for group in names for name in group}
        return {name for group in self.model["param_shapes"] for name in group}

    def read(self, name: str, key: str, start: int, stop: int) -> Tensor | None:
        """Elements start ... stop of a flattened parameter or of its moment; None if there is no such moment.

        Elements behind its end are zeros, as DeepSpeed's padding.
        """
        out = None
        for piece in self._pieces[name]:
            flat = piece.values.get(key)
            if flat is None:
                continue
            if out is None:
                out = torch.zeros(stop - start, dtype=flat.dtype)
            low, high = max(start, piece.start), min(stop, piece.start + piece.length)
            if low < high:
                source = piece.offset + low - piece.start
                out[low - start : high - start] = flat[source : source + high - low].detach()
        return out

    def keys(self, name: str) -> set[str]:
        """The optimizer's keys of a parameter; empty before its first step."""
        return {key for piece in self._pieces[name] for key in piece.values} - {WEIGHT}

    def step(self, name: str) -> Tensor | None:
        """The number of updates of a parameter."""
        return next((p.values["step"] for p in self._pieces[name] if "step" in p.values), None)

    def _add(self, name: str, shape: torch.Size, *pieces: _Piece) -> None:
        self.shapes[name] = torch.Size(shape)
        self._pieces[name] += [piece for piece in pieces if piece.length > 0]

    def _add_whole(self) -> None:
        """ZeRO 0: moments of whole parameters, by their number in the optimizer's groups."""
        optimizer = self.model["optimizer"]
        groups = self.model.get(PARAMETER_NAMES) or []
        for group, names in zip(optimizer["param_groups"], groups):
            for number, name in zip(group["params"], names, strict=True):
                found = {
                    key: value.reshape(-1) if key != "step" else value
                    for key, value in optimizer["state"].get(number, {}).items()
                }
                self._add(name, self.shapes[name], _Piece(0, self.shapes[name].numel(), found, 0))

    def _add_groups(self, flats: Sequence[dict[str, Any]]) -> None:
        """ZeRO 1 and 2: each group's parameters one after the other, cut into equal parts."""
        for number, shapes in enumerate(self.model["param_shapes"]):
            total, cuts, values = sum(shape.numel() for shape in shapes.values()), [0], []
            for flat in flats:
                weights = flat["single_partition_of_fp32_groups"][number]
                state = flat["base_optimizer_state"]["state"].get(number, {})
                values.append({WEIGHT: weights, **state})
                cuts.append(min(total, cuts[-1] + len(weights)))
            at = 0
            for name, shape in shapes.items():
                pieces = []
                for low, high, found in zip(cuts, cuts[1:], values):
                    first, last = max(at, low), min(at + shape.numel(), high)
                    pieces.append(_Piece(first - at, last - first, found, first - low))
                # the fp32 weights of the optimizer, in place of the model's copy
                self._pieces[name] = []
                self._add(name, shape, *pieces)
                at += shape.numel()

    def _add_parts_of_parameters(self, flats: Sequence[dict[str, Any]]) -> None:
        """ZeRO 3: each parameter is cut into equal parts; a rank's parts lie one after the other."""
        for rank, flat in enumerate(flats):
            for number, shapes in enumerate(self.model["param_shapes"]):
                state = flat["optimizer_state_dict"]["state"].get(number, {})
                values, offset = {WEIGHT: flat["fp32_flat_groups"][number], **state}, 0
                for name, shape in shapes.items():
                    size = -(-shape.numel() // self.ranks)
                    start = rank * size
                    length = min(size, shape.numel() - start)
                    self._add(name, shape, _Piece(start, length, values, offset))
                    offset += size

    def _add_frozen_parts(self, models: Sequence[dict[str, Any]]) -> None:
        """ZeRO 3: parameters that are not trained, cut like the others; none if they were left out."""
        for rank, model in enumerate(models):
            for name, shape in (model["frozen_param_shapes"] or {}).items():
                part = model["frozen_param_fragments"][name].reshape(-1)
                start = rank * len(part)
                length = min(len(part), shape.numel() - start)
                self._add(name, shape, _Piece(start, length, {WEIGHT: part}, 0))


@torch.no_grad()
def load_resharded(engine: Any, folder: Path, trained_only: bool = False) -> None:
    """Load what any number of ranks of any ZeRO stage saved; call it on every rank.

    Args:
        folder: of the engine in a checkpoint, with DeepSpeed's files.
        trained_only: frozen parameters may be missing in it.

    Raises:
        UserError: the engine has other parameters, or trains others.
    """
    saved = SavedEngine(folder)
    if engine.zero_nvme_offload_optimizer():
        raise UserError(f"{folder}: states on NVMe cannot be moved to another number of ranks.")
    parameters = dict(engine.module.named_parameters())
    _check_parameters(saved, parameters, folder, trained_only)
    stage = engine.zero_optimization_stage()
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()
    _load_buffers(engine, saved)
    for name, parameter in parameters.items():
        if name not in saved.shapes:
            continue
        if stage == 3:
            _load_part(saved, name, parameter)
        else:
            parameter.copy_(_whole(saved, name, WEIGHT))
    if stage:
        _load_flat_groups(engine, saved, stage)
    else:
        _load_whole_states(engine, saved)
    if stage == 3:
        engine.optimizer.checkpoint_event_epilogue()
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, saved.model[name])


def needs_resharding(engine: Any, folder: Path) -> bool:
    """Whether the files are of another number of ranks or ZeRO stage than the engine's.

    At ZeRO 0 no state is sharded, so the number of ranks does not matter.
    """
    states = list(folder.glob("*optim_states.pt"))
    own = engine.zero_optimization_stage()
    if not states:
        return own != 0
    stage = int(_load(states[0])["optimizer_state_dict"]["zero_stage"])
    return stage != own or len(states) != distributed.world_size()


def parameter_names(engine: Any) -> list[list[str]]:
    """Names of the trained parameters of a ZeRO 0 engine, per group of its optimizer."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    return [[names[p] for p in group["params"]] for group in engine.optimizer.param_groups]


def _by_rank(folder: Path, pattern: str) -> list[dict[str, Any]]:
    def rank(path: Path) -> int:
        found = re.search(r"pp_rank_(\d+)_", path.name)
        return int(found[1]) if found else 0

    return [_load(file) for file in sorted(folder.glob(pattern), key=rank)]


def _load(file: Path) -> dict[str, Any]:
    types: list[Any] = [pkgutil.resolve_name(name) for name in sorted(DEEPSPEED_TYPES)]
    with torch.serialization.safe_globals(types):
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


def _shape(parameter: Any) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _check_parameters(
    saved: SavedEngine, parameters: dict[str, Any], folder: Path, trained_only: bool
) -> None:
    """
    Raises:
        UserError: a parameter is missing in the files, has another shape, or its moments cannot be found.
    """
    checkpoint, other = folder.parents[1], f"holds other weights than this run ({folder.name})"
    trained = saved.trained
    if trained is None:
        raise UserError(
            f"{checkpoint} was written at ZeRO 0 by an earlier version, which did not record the names of "
            "parameters: resume with engine.zero_stage 0, or start a new run from its weights (init_from)."
        )
    for name, parameter in parameters.items():
        if name not in saved.shapes:
            if trained_only and not parameter.requires_grad:
                continue
            raise UserError(f"{checkpoint} {other}: it has no {name}.")
        if saved.shapes[name] != _shape(parameter):
            raise UserError(
                f"{checkpoint} {other}: {name} is {tuple(saved.shapes[name])}, here "
                f"{tuple(_shape(parameter))}."
            )
    if more := saved.shapes.keys() - parameters.keys():
        raise UserError(f"{checkpoint} {other}: it also has {min(more)}.")
    if changed := trained ^ {name for name, parameter in parameters.items() if parameter.requires_grad}:
        raise UserError(
            f"{checkpoint} is of a run that trained other parameters ({min(changed)}): start a new run from "
            "its weights (init_from)."
        )


def _load_buffers(engine: Any, saved: SavedEngine) -> None:
    buffers = dict(engine.module.named_buffers())
    for name in saved.model["buffer_names"]:
        if name in buffers:
            buffers[name].copy_(saved.model["module"][name])


def _whole(saved: SavedEngine, name: str, key: str) -> Any:
    shape = saved.shapes[name]
    flat = saved.read(name, key, 0, shape.numel())
    return None if flat is None else flat.view(shape)


def _load_part(saved: SavedEngine, name: str, parameter: Any) -> None:
    """This rank's part of a parameter at ZeRO 3."""
    start, stop = _own_part(parameter)
    values = saved.read(name, WEIGHT, start, stop)
    assert values is not None
    parameter.ds_tensor.copy_(values)


def _own_part(parameter: Any) -> tuple[int, int]:
    size = parameter.ds_tensor.ds_numel
    if size * distributed.world_size() < parameter.ds_numel:
        # MiCS: groups of ranks hold a whole copy each
        raise UserError("Parameters are sharded within groups of ranks: resume on the same number of ranks.")
    return distributed.rank() * size, (distributed.rank() + 1) * size


def _load_whole_states(engine: Any, saved: SavedEngine) -> None:
    """Moments at ZeRO 0."""
    current, states = engine.optimizer.state_dict(), {}
    for group, names in zip(current["param_groups"], parameter_names(engine), strict=True):
        for number, name in zip(group["params"], names, strict=True):
            state = {key: _whole(saved, name, key) for key in saved.keys(name) - {"step"}}
            step = saved.step(name)
            if step is not None:
                states[number] = {**state, "step": step.clone()}
    engine.optimizer.load_state_dict({**current, "state": states})


def _load_flat_groups(engine: Any, saved: SavedEngine, stage: int) -> None:
    """This rank's parts of the flat groups at ZeRO 1 to 3, in DeepSpeed's own form, which it then loads."""
    zero = engine.optimizer
    current = zero.state_dict()
    weights_key, state_key = (
        ("fp32_flat_groups", "optimizer_state_dict")
        if stage == 3
        else ("single_partition_of_fp32_groups", "base_optimizer_state")
    )
    weights, states = [], {}
    for number, shapes in enumerate(engine._get_zero_param_shapes()):
        if stage == 3:
            size, spans = len(zero.fp32_partitioned_groups_flat[number]), []
            at = 0
            for parameter in zero.fp16_groups[number]:
                start, stop = _own_part(parameter)
                spans.append((engine.param_names[parameter], start, stop, at))
                at += stop - start
        else:
            size = len(zero.single_partition_of_fp32_groups[number])
            spans = _spans(shapes, distributed.rank() * size, size)
        weights.append(_gather(saved, spans, WEIGHT, size))
        keys = {key for name in shapes for key in saved.keys(name)}
        steps = [step for name in shapes if (step := saved.step(name)) is not None]
        if steps:
            moments = {key: _gather(saved, spans, key, size) for key in sorted(keys - {"step"})}
            states[number] = {**moments, "step": torch.stack(steps).max()}
    loaded = {**current, weights_key: weights}
    loaded[state_key] = {**current[state_key], "state": states}
    others = [None] * distributed.world_size()
    others[distributed.rank()] = loaded  # pyright: ignore
    zero.load_state_dict(others, load_optimizer_states=True, load_from_fp32_weights=True)


def _spans(shapes: dict[str, torch.Size], start: int, size: int) -> list[tuple[str, int, int, int]]:
    """(name, first, last, offset) of every parameter in elements start ... start + size of a flat group."""
    spans, at = [], 0
    for name, shape in shapes.items():
        first, last = max(at, start), min(at + shape.numel(), start + size)
        if first < last:
            spans.append((name, first - at, last - at, first - start))
        at += shape.numel()
    return spans


def _gather(saved: SavedEngine, spans: Sequence[tuple[str, int, int, int]], key: str, size: int) -> Tensor:
    out = torch.zeros(size)
    for name, start, stop, at in spans:
        values = saved.read(name, key, start, stop)
        # a parameter may have got its first gradient later than others of its group
        if values is not None:
            out[at : at + stop - start] = values
    return out

"""Which expert gets which text: MergeME's table 2 for sequence-routed models, its figure 5 for token-routed ones.

Shapes: D documents, E experts, L layers, T tokens, H hidden.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerge.calibration.texts import read_documents
from moerge.checkpoint.manifest import read_manifest, to_json
from moerge.errors import InputError
from moerge.inference.figure import draw
from moerge.inference.loading import Loaded, load

if TYPE_CHECKING:
    import torch

TOKENS = 512


@dataclass(frozen=True)
class TextRoute:
    """How one text is routed, averaged over its documents (and, in a token-routed model, over layers and tokens).

    `alpha_E` is the weight of each expert, `first_E` how often it is the one with the largest weight, `entropy` that of the
    weights in nats. `accuracy` is `first_E` of the expert of the same name, None if there is no such expert.
    """

    name: str
    documents: int
    alpha_E: tuple[float, ...]
    first_E: tuple[float, ...]
    entropy: float
    accuracy: float | None


@dataclass(frozen=True)
class Routes:
    """How texts are routed. `level` is "sequence" or "token"."""

    checkpoint: str
    level: str
    experts: tuple[str, ...]
    texts: tuple[TextRoute, ...]

    @property
    def accuracy(self) -> float | None:
        """The mean over the texts that have an expert of their name."""
        known = [text.accuracy for text in self.texts if text.accuracy is not None]
        return sum(known) / len(known) if known else None

    @property
    def load_E(self) -> tuple[float, ...]:
        """Mean weight of each expert, every text counting the same."""
        return _mean([text.alpha_E for text in self.texts])

    @property
    def balance(self) -> float:
        """E * sum_i first_i * alpha_i over all texts: 1 where every expert gets the same, E where one gets everything."""
        first_E = _mean([text.first_E for text in self.texts])
        return len(self.experts) * sum(first * alpha for first, alpha in zip(first_E, self.load_E, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Everything for `--json`."""
        return {
            "checkpoint": self.checkpoint,
            "level": self.level,
            "experts": list(self.experts),
            "texts": {
                text.name: {
                    "documents": text.documents,
                    "alpha": dict(zip(self.experts, text.alpha_E, strict=True)),
                    "first": dict(zip(self.experts, text.first_E, strict=True)),
                    "entropy": text.entropy,
                    "accuracy": text.accuracy,
                }
                for text in self.texts
            },
            "accuracy": self.accuracy,
            "load": dict(zip(self.experts, self.load_E, strict=True)),
            "balance": self.balance,
        }

    def to_csv(self) -> str:
        """A row for each text and expert."""
        out = io.StringIO()
        table = csv.writer(out, lineterminator="\n")
        table.writerow(["text", "documents", "expert", "alpha", "first"])
        for text in self.texts:
            for expert, alpha, first in zip(self.experts, text.alpha_E, text.first_E, strict=True):
                table.writerow([text.name, text.documents, expert, f"{alpha:.6f}", f"{first:.6f}"])
        return out.getvalue()

    def write(self, folder: Path) -> None:
        """`route.json`, `route.csv` and, where matplotlib is installed, `route.svg` in a folder, which is made if need be."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "route.json").write_bytes(to_json(self.to_json()))
            (folder / "route.csv").write_text(self.to_csv(), encoding="utf-8")
            if find_spec("matplotlib"):
                draw(self, folder / "route.svg")
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None


def route(
    checkpoint: str | Path | Loaded,
    texts: Mapping[str, str],
    *,
    limit: int = 100,
    tokens: int = TOKENS,
    trust_remote_code: bool = False,
) -> Routes:
    """How a MoE routes the first `limit` documents, up to `tokens` tokens of each, of files (txt, jsonl, parquet) by name.

    A text that has an expert's name is taken to be of that expert's domain. Raises InputError if a text cannot be read or the
    checkpoint is no MoE.
    """
    documents = {name: _documents(name, location, limit) for name, location in texts.items()}
    if not documents:
        raise InputError("no text to route: name at least one with --text NAME=FILE")
    loaded = checkpoint if isinstance(checkpoint, Loaded) else load(checkpoint, trust_remote_code=trust_remote_code)
    experts = _experts(loaded)
    weights = _by_sequence if loaded.by_sequence else _by_token
    found = []
    for name, listed in documents.items():
        weighed = [weights(loaded, loaded.encode(document, tokens), len(experts)) for document in listed]
        alpha_E, first_E = _mean([row[0] for row in weighed]), _mean([row[1] for row in weighed])
        accuracy = first_E[experts.index(name)] if name in experts else None
        entropy = sum(row[2] for row in weighed) / len(weighed)
        found.append(TextRoute(name, len(listed), alpha_E, first_E, entropy, accuracy))
    return Routes(loaded.name, "sequence" if loaded.by_sequence else "token", experts, tuple(found))


def parse_texts(given: Sequence[str]) -> dict[str, str]:
    """Files by name from `NAME=FILE` each; InputError for anything else."""
    texts: dict[str, str] = {}
    for entry in given:
        name, equals, location = entry.partition("=")
        if not (name and equals and location):
            raise InputError(f"--text {entry!r} should be NAME=FILE, such as math=math.jsonl")
        if name in texts:
            raise InputError(f"--text {name!r} is given twice: put several files in a folder, or use a pattern")
        texts[name] = location
    return texts


Weighed = tuple[Sequence[float], Sequence[float], float]
"""alpha_E, first_E and entropy of a document."""


def _documents(name: str, location: str, limit: int) -> list[str]:
    try:
        found = list(islice(read_documents(location), limit))
    except InputError as error:
        raise InputError(f"text {name!r}: {error}") from None
    if not found:
        raise InputError(f"text {name!r}: {location} holds no text: name a file with some")
    return found


def _experts(loaded: Loaded) -> tuple[str, ...]:
    """Names of the experts; their numbers where nobody wrote the names down."""
    config = loaded.model.config
    if loaded.by_sequence:
        return tuple(config.expert_names)
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if not count:
        raise InputError(f"{loaded.name} is a {config.model_type} model without experts: only a MoE routes")
    manifest = read_manifest(Path(loaded.name).expanduser())
    named = tuple(manifest["experts"]) if manifest else ()
    return named if len(named) == count else tuple(map(str, range(count)))


def _by_sequence(loaded: Loaded, ids_1T: torch.Tensor, experts: int) -> Weighed:
    alpha_E = loaded.model.route(ids_1T).alpha[0].tolist()
    best = max(range(experts), key=alpha_E.__getitem__)
    first_E = [float(expert == best) for expert in range(experts)]
    return alpha_E, first_E, sum(-alpha * math.log(alpha) for alpha in alpha_E if 0 < alpha < 1)


def _by_token(loaded: Loaded, ids_1T: torch.Tensor, experts: int) -> Weighed:
    """From the softmax over all experts of every layer's gate."""
    import torch

    with torch.no_grad(), _gate_inputs(loaded, experts) as seen:
        loaded.model.base_model(input_ids=ids_1T, use_cache=False)
    logits_NE = torch.cat([(state_TH @ gate_EH.T).float() for state_TH, gate_EH in seen])  # N: layers times tokens
    log_NE = logits_NE.log_softmax(-1)
    first_E = torch.nn.functional.one_hot(logits_NE.argmax(-1), experts).float().mean(0)
    return log_NE.exp().mean(0).tolist(), first_E.tolist(), float(-(log_NE.exp() * log_NE).sum(-1).mean())


@contextmanager
def _gate_inputs(loaded: Loaded, experts: int) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        seen.append((arguments[0].reshape(-1, arguments[0].shape[-1]), module.weight.detach()))

    named = [module for name, module in loaded.model.named_modules() if name.endswith(".gate")]
    gates = [module for module in named if hasattr(module, "weight") and len(module.weight) == experts]
    if not gates:
        raise InputError(f"{loaded.name}: moerge finds no gates in a model of type {loaded.model.config.model_type}")
    handles = [gate.register_forward_pre_hook(look) for gate in gates]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _mean(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))

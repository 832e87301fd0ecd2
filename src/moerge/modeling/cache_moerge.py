"""The cache of the sequence-routed model: the routing of its sequences, and a DynamicCache per attention that runs."""

# mypy: allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .routing_moerge import WHOLE, Routing, Share
from .versions_moerge import Cache, DynamicCache


class MoergeCache(Cache):
    """Keys and values of the chosen experts, each with only the rows that it computes, and the routing that chose them.

    The routing is that of the prompt that filled the cache first and stays while the cache is used. Where all experts share one
    attention on one residual stream there is a single lane with every row, else one lane for each share of the routing.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(layers=[])
        self.expert_config = None if config is None else config.expert_config
        self.routing: Routing | None = None
        self.shares: list[Share] = []
        self.lanes: list[Any] = []
        self.apart = False
        self._one_attention = config is not None and not {"attention", "norm"} & set(config.separate)
        self._record_past = False

    def new_lane(self, expert: int = 0) -> Any:
        """An empty cache for one attention, or for all of an expert's."""
        lane = DynamicCache(config=self.expert_config)
        if self._record_past:  # from the first token on: the prompt itself may run past a sliding window
            lane.activate_past_recording()
        return lane

    def begin(self, routing: Routing, *, apart: bool, filled: dict[int, Any] | None = None) -> list[Share]:
        """Take the routing of the prompt; its shares. `apart` says that every share has its own residual stream.

        `filled` are lanes with every row by expert, as a routing pass leaves them: the shares keep their rows of them.
        """
        shares = routing.shares()
        self.routing, self.apart, self.shares = routing.detach(), apart, [share.detach() for share in shares]
        if filled is None:
            self.lanes = [self.new_lane(s.expert) for s in (self.shares if self._lane_per_share else (WHOLE,))]
        else:
            self.lanes = [_narrow(WHOLE, filled[s.expert], s.rows_R) for s in self.shares]
        return shares

    @property
    def _lane_per_share(self) -> bool:
        return self.apart or not self._one_attention

    def take(self, rows_R: Tensor) -> None:
        """Keep these rows, in this order; rows may repeat."""
        if self.routing is None:
            return
        before, self.routing = self.shares, self.routing.take(rows_R)
        self.shares = self.routing.shares()
        if not self._lane_per_share:
            self.lanes[0].reorder_cache(rows_R)
            return
        lanes = {share.expert: (share, lane) for share, lane in zip(before, self.lanes, strict=True)}
        self.lanes = [_narrow(*lanes[share.expert], share.take(rows_R)) for share in self.shares]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search goes on with these rows."""
        self.take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.take(torch.arange(self.batch_size, device=indices.device)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.routing is not None:
            self.take(torch.arange(self.batch_size, device=self.routing.alpha.device).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything, the routing too."""
        self.routing, self.shares, self.lanes = None, [], []

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens."""
        for lane in self.lanes:
            lane.crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Keep what sliding windows would drop, so that `crop` can go back."""
        self._record_past = hasattr(Cache, "activate_past_recording")
        for lane in self.lanes:
            lane.activate_past_recording()

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values belong to an expert: only its own lane takes them."""
        raise TypeError("a MoergeCache takes no keys and values itself: only a moerge model can fill it")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens that it has seen."""
        return int(self.lanes[0].get_seq_length(layer_idx)) if self.lanes else 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The position of the next token."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask covers."""
        if not self.lanes:
            return query_length, 0
        length, offset = self.lanes[0].get_mask_sizes(query_length, layer_idx)
        return length, offset

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The largest length, -1 for none."""
        return int(self.lanes[0].get_max_length(layer_idx)) if self.lanes else -1

    def is_recording_past(self, layer_idx: int) -> bool:
        """Return whether what a sliding window drops is kept."""
        return self._record_past

    @property
    def batch_size(self) -> int:
        """Return the number of sequences that it holds, -1 before the first."""
        return -1 if self.routing is None else len(self.routing.alpha)

    @property
    def is_initialized(self) -> bool:
        """Return whether it holds anything."""
        return self.routing is not None

    @property
    def is_compileable(self) -> bool:
        """Never: which expert runs depends on the prompt."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Return whether `crop` leaves no trace."""
        return all(lane.is_croppable for lane in self.lanes)

    @property
    def is_sliding(self) -> list[bool]:
        """Return, layer by layer, whether it slides."""
        return list(self.lanes[0].is_sliding) if self.lanes else []

    @property
    def is_linear(self) -> list[bool]:
        """Return, layer by layer, whether it counts no tokens: none, the cache counts them itself."""
        return [False] * max(1, len(self))

    def __len__(self) -> int:
        return len(self.lanes[0]) if self.lanes else 0

    def __repr__(self) -> str:
        return f"MoergeCache({len(self.lanes)} lanes, {self.get_seq_length()} tokens, {self.batch_size} sequences)"


def _narrow(share: Share, lane: Any, rows_R: Tensor | None) -> Any:
    """Keep of a share's lane these rows of the whole batch, all of which it has; None: every row."""
    if rows_R is not None:
        if share.rows_R is not None:
            rows_R = torch.searchsorted(share.rows_R, rows_R.to(share.rows_R.device))
        lane.reorder_cache(rows_R)
    return lane

"""The fitted curves of one chip, and the files that they ship in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from sim.curves import Curve
from sim.hardware import Hardware
from sim.profiles.gemm import GemmGrid

DATA = Path(__file__).parent / "data"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedAttention:
    """Decoding rows beside chunks: by KV entries · query heads · head size; a row's own seconds per query head."""

    curve: Curve
    row_head_s: float
    row_token_head_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChipProfile:
    """Fitted timings of one chip.

    Attributes:
        name: as in ``conf/hardware``.
        source, licence, measured_with: where the measurements are from, for reports.
        flops_per_s, memory_bytes_per_s: of the sheet that the efficiencies are shares of; a sheet with other
            figures is another chip.
        gemm: by data type.
        decode: query heads per KV head → seconds of one layer by bytes of keys and values.
        decode_row_entries: see ``Operators``.
        decode_context_dim_s: query heads per KV head → ``Operators.decode_context_s`` per element of a head.
        prefill: seconds of one layer by query-key pairs · query heads · head size.
        prefill_token_pairs: see ``Operators``.
        prefill_context_dim_s: seconds per KV entry that one chunk reads, per element of a head; ``None``: roofline.
        mixed: ``None`` where it was not measured.
        all_reduce: devices → seconds by bytes.
        sampling: by logits; ``None``: roofline.
        elementwise_kernel_s, elementwise_bytes_per_s: of a kernel that moves few bytes, and of many.
        held_out: errors by operator on sizes that the fit did not see: median, p90, bias, num_points.
        notes: what a reader of reports should know.
    """

    name: str
    source: str
    licence: str
    measured_with: str
    flops_per_s: dict[str, float]
    memory_bytes_per_s: float
    gemm: dict[str, GemmGrid]
    decode: dict[int, Curve]
    decode_row_entries: float
    decode_context_dim_s: dict[int, float]
    prefill: Curve
    prefill_token_pairs: float
    prefill_context_dim_s: float | None
    mixed: MixedAttention | None
    all_reduce: dict[int, Curve]
    sampling: Curve | None
    elementwise_kernel_s: float
    elementwise_bytes_per_s: float
    held_out: dict[str, dict[str, float]]
    notes: str = ""

    def fits(self, hardware: Hardware) -> bool:
        """Whether the sheet is of the chip that was measured, unchanged in what the curves depend on."""
        same_rates = all(hardware.flops_per_s.get(name) == rate for name, rate in self.flops_per_s.items())
        return same_rates and hardware.memory_bytes_per_s == self.memory_bytes_per_s

    def to_plain(self) -> dict[str, Any]:
        """Plain values for a JSON file, numbers to five digits."""
        plain: dict[str, Any] = {"format": FORMAT}
        for name in (
            "name",
            "source",
            "licence",
            "measured_with",
            "notes",
            "flops_per_s",
            "memory_bytes_per_s",
        ):
            plain[name] = getattr(self, name)
        plain["gemm"] = {dtype: grid.to_plain() for dtype, grid in self.gemm.items()}
        plain["decode"] = {str(group): _plain_curve(curve) for group, curve in self.decode.items()}
        plain["decode_context_dim_s"] = {
            str(group): _rounded(value) for group, value in self.decode_context_dim_s.items()
        }
        plain["all_reduce"] = {str(count): _plain_curve(curve) for count, curve in self.all_reduce.items()}
        plain["prefill"] = _plain_curve(self.prefill)
        plain["sampling"] = None if self.sampling is None else _plain_curve(self.sampling)
        plain["mixed"] = None
        if self.mixed is not None:
            plain["mixed"] = {
                "curve": _plain_curve(self.mixed.curve),
                "row_head_s": _rounded(self.mixed.row_head_s),
                "row_token_head_s": _rounded(self.mixed.row_token_head_s),
            }
        for name in (
            "decode_row_entries",
            "prefill_token_pairs",
            "prefill_context_dim_s",
            "elementwise_kernel_s",
            "elementwise_bytes_per_s",
        ):
            value = getattr(self, name)
            plain[name] = None if value is None else _rounded(value)
        plain["held_out"] = self.held_out
        return plain

    def save(self, path: Path) -> None:
        """Write the profile as JSON, small enough for a repository."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_plain(), separators=(",", ":")) + "\n")


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _plain_curve(curve: Curve) -> dict[str, Any]:
    return {
        "x": [_rounded(value) for value in curve.x],
        "seconds": [_rounded(value) for value in curve.seconds],
        "relative_std": _rounded(curve.relative_std),
    }


def _curve_of(plain: Mapping[str, Any], source: str) -> Curve:
    return Curve(
        x=tuple(plain["x"]),
        seconds=tuple(plain["seconds"]),
        relative_std=plain["relative_std"],
        source=source,
    )


def load_profile(path: str | Path) -> ChipProfile:
    """Read what :meth:`ChipProfile.save` wrote.

    Raises:
        ValueError: no such file, or one of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the JSON file of a chip's profile")
    try:
        plain = cast("dict[str, Any]", json.loads(path.read_text()))
        if plain["format"] != FORMAT:
            raise ValueError(f"format {plain['format']!r}, this version reads {FORMAT}")
        source = f"{plain['source']} ({plain['measured_with']})"
        mixed = plain["mixed"]
        return ChipProfile(
            name=plain["name"],
            source=plain["source"],
            licence=plain["licence"],
            measured_with=plain["measured_with"],
            notes=plain["notes"],
            flops_per_s=plain["flops_per_s"],
            memory_bytes_per_s=plain["memory_bytes_per_s"],
            gemm={dtype: GemmGrid.from_plain(grid) for dtype, grid in plain["gemm"].items()},
            decode={int(group): _curve_of(curve, source) for group, curve in plain["decode"].items()},
            decode_row_entries=plain["decode_row_entries"],
            decode_context_dim_s={
                int(group): value for group, value in plain["decode_context_dim_s"].items()
            },
            prefill=_curve_of(plain["prefill"], source),
            prefill_token_pairs=plain["prefill_token_pairs"],
            prefill_context_dim_s=plain["prefill_context_dim_s"],
            mixed=None
            if mixed is None
            else MixedAttention(
                curve=_curve_of(mixed["curve"], source),
                row_head_s=mixed["row_head_s"],
                row_token_head_s=mixed["row_token_head_s"],
            ),
            all_reduce={int(count): _curve_of(curve, source) for count, curve in plain["all_reduce"].items()},
            sampling=None if plain["sampling"] is None else _curve_of(plain["sampling"], source),
            elementwise_kernel_s=plain["elementwise_kernel_s"],
            elementwise_bytes_per_s=plain["elementwise_bytes_per_s"],
            held_out=plain["held_out"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a chip's profile: {error!r}") from error


@cache
def shipped_profile(name: str) -> ChipProfile | None:
    """The profile of a chip that comes with the package, or ``None``."""
    path = DATA / f"{name}.json"
    return load_profile(path) if path.is_file() else None


def profile_of(hardware: Hardware) -> ChipProfile | None:
    """The fitted profile that the sheet asks for: ``timings`` is "auto" (the shipped one where it fits the sheet's
    figures), "fitted" (it must), "roofline" (none), or the path of a profile.

    Raises:
        ValueError: "fitted", but no profile ships for this chip or its sheet was changed; a file that is no profile.
    """
    if hardware.timings == "roofline":
        return None
    if hardware.timings not in ("auto", "fitted"):
        return load_profile(hardware.timings)
    profile = shipped_profile(hardware.name)
    if profile is not None and profile.fits(hardware):
        return profile
    if hardware.timings == "fitted":
        reason = "no profile ships for it" if profile is None else "its sheet was changed"
        raise ValueError(
            f"hardware.timings=fitted, but {reason} ({hardware.name}): use hardware.timings=roofline, or auto, which "
            "takes the roofline then"
        )
    return None

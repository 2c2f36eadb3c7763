"""Measured end-to-end rows of dense models against the closed form with the chips' fitted curves.

The host's overheads of an engine on a chip are fitted on the rows whose id has an even CRC-32; all that is reported
is on the odd ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from sim.silicon import SiliconRow, fit_host, predict, read_rows
from sim.steady_state import HostOverhead
from specdec import plots_validation
from specdec.config import Config
from specdec.report import summary_table
from specdec.tracking import Run

COLUMNS = {
    "engine": "engine",
    "chip": "chip",
    "num_rows": "rows",
    "tpot_median_pct": "TPOT error %",
    "tpot_bias_pct": "TPOT bias %",
    "tpot_p90_pct": "TPOT p90 %",
    "ttft_median_pct": "TTFT error %",
    "step_ms": "host, ms/step",
    "row_us": "host, µs/row",
    "layer_us": "µs/layer",
}
_REASONS = """\
### Where it is wrong, and why

* Kernels were measured one at a time. Where an engine fuses them and overlaps their launches, small ones take less:
  most on the fastest chip with the model shared among many devices (B200), where a decoder layer is a few tens of
  microseconds; at most the elementwise kernels' 12 µs per layer are taken off for it.
* The rows do not say how requests arrived. A burst of equal requests runs in step, which the steady state does not
  do: times to first token, which are mostly queueing, are off by far more than times per output token.
* Rows that name a concurrency which the engine cannot have been kept at (the products alone would take longer) are
  kept; they are the far outliers.
"""


def run(config: Config, run: Run) -> tuple[dict[str, Any], str]:
    """The summary, and the section of the report."""
    assert config.validate.silicon is not None
    rows, left = read_rows(config.validate.silicon)
    held_out = [row for row in rows if row.is_held_out]
    if not held_out or len(held_out) == len(rows):
        raise ValueError(f"{config.validate.silicon} has no usable rows on both halves of the ids")
    hosts = {
        key: fit_host([row for row in rows if _key(row) == key and not row.is_held_out])
        for key in _keys(rows)
    }
    errors = _errors(held_out, hosts)
    table = [
        _row(part, errors, lambda row, key=key: _key(row) == key, engine=key[0], chip=key[1], host=hosts[key])
        for key, part in ((key, [row for row in held_out if _key(row) == key]) for key in hosts)
        if part
    ]
    table.append(_row(held_out, errors, lambda _: True, engine="all", chip="", host=None))
    run.console.print(
        summary_table(table, COLUMNS, title="silicon rows, odd half; host fitted on the even half")
    )
    run.log_table("silicon", table)
    run.log_table("silicon_rows", [_plain(row, hosts[_key(row)]) for row in held_out])
    _draw(run, held_out, hosts)
    total = table[-1]
    run.log_metrics({f"silicon/{name}": total[name] for name in ("tpot_median_pct", "ttft_median_pct")})
    summary = {
        "num_rows": len(rows),
        "num_held_out": len(held_out),
        "left_out": left,
        "tpot_median_error_pct": total["tpot_median_pct"],
        "tpot_bias_pct": total["tpot_bias_pct"],
        "ttft_median_error_pct": total["ttft_median_pct"],
        "by_engine_and_chip": table[:-1],
        "hosts": {f"{engine} on {chip}": asdict(host) for (engine, chip), host in hosts.items()},
    }
    return {"silicon": summary}, _page(table, summary)


def _key(row: SiliconRow) -> tuple[str, str]:
    return row.engine, row.chip


def _keys(rows: list[SiliconRow]) -> list[tuple[str, str]]:
    """Engines and chips that have rows to fit to."""
    return sorted({_key(row) for row in rows if not row.is_held_out})


def _predicted(
    rows: list[SiliconRow], hosts: dict[tuple[str, str], HostOverhead]
) -> tuple[np.ndarray, np.ndarray]:
    pairs = [predict([row], hosts.get(_key(row), HostOverhead())) for row in rows]
    return np.concatenate([pair[0] for pair in pairs]), np.concatenate([pair[1] for pair in pairs])


def _errors(
    rows: list[SiliconRow], hosts: dict[tuple[str, str], HostOverhead]
) -> dict[str, tuple[float, float]]:
    """Row → signed relative errors of TTFT and TPOT."""
    ttft_s, tpot_s = _predicted(rows, hosts)
    return {
        row.row_id: (float(ttft_s[index] / row.ttft_s - 1.0), float(tpot_s[index] / row.tpot_s - 1.0))
        for index, row in enumerate(rows)
    }


def _row(
    rows: list[SiliconRow],
    errors: dict[str, tuple[float, float]],
    chosen: Callable[[SiliconRow], bool],
    *,
    engine: str,
    chip: str,
    host: HostOverhead | None,
) -> dict[str, Any]:
    ttft, tpot = (np.array([errors[row.row_id][index] for row in rows if chosen(row)]) for index in (0, 1))
    return {
        "engine": engine,
        "chip": chip,
        "num_rows": int(tpot.size),
        "tpot_median_pct": 100.0 * float(np.median(np.abs(tpot))),
        "tpot_bias_pct": 100.0 * float(np.median(tpot)),
        "tpot_p90_pct": 100.0 * float(np.quantile(np.abs(tpot), 0.9)),
        "ttft_median_pct": 100.0 * float(np.median(np.abs(ttft))),
        "step_ms": None if host is None else 1e3 * host.step_s,
        "row_us": None if host is None else 1e6 * host.row_s,
        "layer_us": None if host is None else 1e6 * host.layer_s,
    }


def _plain(row: SiliconRow, host: HostOverhead) -> dict[str, Any]:
    ttft_s, tpot_s = predict([row], host)
    return {
        "id": row.row_id,
        "engine": row.engine,
        "chip": row.chip,
        "model": row.model,
        "dtype": row.dtype,
        "tensor_parallel": row.tensor_parallel,
        "prompt": row.point.prompt,
        "output": row.point.output,
        "concurrency": row.point.concurrency,
        "ttft_ms": 1e3 * row.ttft_s,
        "ttft_predicted_ms": 1e3 * float(ttft_s[0]),
        "tpot_ms": 1e3 * row.tpot_s,
        "tpot_predicted_ms": 1e3 * float(tpot_s[0]),
    }


def _draw(run: Run, rows: list[SiliconRow], hosts: dict[tuple[str, str], HostOverhead]) -> None:
    panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {
        "Time per output token": {},
        "Time to first token": {},
    }
    for key in hosts:
        part = [row for row in rows if _key(row) == key]
        if part:
            ttft_s, tpot_s = _predicted(part, hosts)
            label = f"{key[0]}, {key[1]}"
            panels["Time per output token"][label] = (
                np.array([row.tpot_s for row in part]) * 1e3,
                tpot_s * 1e3,
            )
            panels["Time to first token"][label] = (
                np.array([row.ttft_s for row in part]) * 1e3,
                ttft_s * 1e3,
            )
    run.log_figure("silicon", plots_validation.row_scatter(panels))


def _page(table: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    lines = [
        "## Measured end-to-end rows (aiconfigurator's silicon table)",
        "",
        f"{summary['num_rows']} rows of dense models on chips with fitted curves, aggregated serving; host overheads "
        "fitted for each engine and chip on the even half of the ids, errors on the odd half "
        f"({summary['num_held_out']} rows). TPOT: median error {summary['tpot_median_error_pct']:.1f} %, bias "
        f"{summary['tpot_bias_pct']:+.1f} %; TTFT: median error {summary['ttft_median_error_pct']:.0f} %.",
        "",
        "| engine | chip | rows | TPOT error % | bias % | p90 % | TTFT error % |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in table:
        lines.append(
            f"| {row['engine']} | {row['chip']} | {row['num_rows']} | {row['tpot_median_pct']:.1f} | "
            f"{row['tpot_bias_pct']:+.1f} | {row['tpot_p90_pct']:.0f} | {row['ttft_median_pct']:.0f} |"
        )
    left = ", ".join(f"{count} {reason}" for reason, count in sorted(summary["left_out"].items()))
    lines += ["", f"Left out: {left}.", "", "![predicted against measured](plots/silicon.png)", "", _REASONS]
    return "\n".join(lines)

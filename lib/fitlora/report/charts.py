"""The charts of the report as Vega-Lite specifications: pure functions of what the artifacts say.

Colours and fonts are the page's business, which knows whether it is light or dark.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fitlora.artifacts import Components, Estimate, Evaluation, MemoryEstimate
from fitlora.report.log import TrainingLog
from fitlora.units import GIB, MIB

Spec = dict[str, Any]

COMPONENTS = {
    "weights": "weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer_states": "optimizer states",
    "activations": "activations",
    "temporary_buffers": "temporary buffers",
    "library_workspaces": "library workspaces",
}
PHASES = {
    "load": "load",
    "build": "between phases",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "evaluation": "evaluation",
}
_WIDE = 30.0  # largest over smallest, from which on a scale is logarithmic


def of(
    evaluation: Evaluation, estimate: MemoryEstimate, log: TrainingLog
) -> Iterator[tuple[str, Spec]]:
    """Each chart with its name."""
    yield "exact-match", exact_match(evaluation)
    yield "loss-by-model", loss_by_model(evaluation)
    yield "loss", loss(log)
    yield "speed", speed(log)
    yield "components", components(estimate)
    if estimate.over_step:
        yield "over-step", over_step(estimate)
    yield "phases", phases(estimate.default, log)
    yield "memory", memory(log)


def exact_match(evaluation: Evaluation) -> Spec:
    """Share of exact answers of each model, with its interval."""
    rows = [
        _with_interval(title, m.exact_match, m.exact_match_interval)
        for title, m in _metrics(evaluation)
    ]
    axis = {"format": ".0%", "values": [0, 0.25, 0.5, 0.75, 1]}
    return _bars(rows, {"axis": axis, "scale": {"domain": [0, 1.35], "nice": False}}, ".1%")


def loss_by_model(evaluation: Evaluation) -> Spec:
    """Loss of each model, with its interval."""
    rows = [_with_interval(title, m.loss, m.loss_interval) for title, m in _metrics(evaluation)]
    top = 1.25 * max(row["high"] for row in rows)  # room for the figure behind the bar
    return _bars(rows, {"axis": {"tickCount": 5}, "scale": {"domain": [0, top]}}, ".4f")


def _metrics(evaluation: Evaluation) -> Iterator[tuple[str, Any]]:
    for name, title in evaluation.titles.items():
        yield title, getattr(evaluation, name)


def _with_interval(title: str, value: float, interval: tuple[float, float]) -> dict[str, Any]:
    return {"model": title, "value": value, "low": interval[0], "high": interval[1]}


def _bars(rows: Sequence[Mapping[str, Any]], x: Spec, number: str) -> Spec:
    y = {"field": "model", "type": "nominal", "sort": None, "title": None}
    tooltip = [
        {"field": "model", "type": "nominal"},
        {"field": "value", "type": "quantitative", "format": number},
        {"field": "low", "type": "quantitative", "format": number, "title": "95% from"},
        {"field": "high", "type": "quantitative", "format": number, "title": "95% to"},
    ]
    bars = {
        "mark": {"type": "bar", "height": {"band": 0.62}, "cornerRadiusEnd": 3},
        "encoding": {
            "x": {"field": "value", "type": "quantitative", "title": None, **x},
            "color": _color("model", [row["model"] for row in rows], legend=False),
            "tooltip": tooltip,
        },
    }
    whiskers = {
        "mark": {"type": "rule", "strokeWidth": 1.5},
        "encoding": {"x": {"field": "low", "type": "quantitative"}, "x2": {"field": "high"}},
    }
    figures = {
        "mark": {"type": "text", "align": "left", "dx": 8},
        "encoding": {
            "x": {"field": "high", "type": "quantitative"},
            "text": {"field": "value", "type": "quantitative", "format": number},
        },
    }
    return _layers(rows, [bars, whiskers, figures], y=y, height=36 * len(rows))


def loss(log: TrainingLog) -> Spec:
    """Training and validation loss over the steps."""
    rows = [_point(entry, "training", entry["loss"]) for entry in log.steps]
    rows += [_point(entry, "validation", entry["validation_loss"]) for entry in log.evaluations]
    encoding = {
        "y": {
            "field": "value",
            "type": "quantitative",
            "title": "loss (nats a token)",
            "scale": _scale([row["value"] for row in rows]),
            "axis": {"tickCount": 5},
        },
        "color": _color("what", ["training", "validation"]),
    }
    return _over_steps(rows, encoding, ".4f", last=log.end["steps"], points={"what": "validation"})


def speed(log: TrainingLog) -> Spec:
    """Tokens per second of each step, and the forecast."""
    rows = [_point(entry, "measured", entry["tokens_per_second"]) for entry in log.steps]
    lines = [
        (what, value) for what, value in [("forecast", log.forecast_tokens_per_second)] if value
    ]
    encoding = {
        "y": {
            "field": "value",
            "type": "quantitative",
            "title": "tokens per second",
            "axis": {"tickCount": 5},
        },
        "color": _color("what", ["measured", "forecast"], legend=bool(lines)),
    }
    return _over_steps(rows, encoding, ",.0f", last=log.end["steps"], lines=lines)


def memory(log: TrainingLog) -> Spec:
    """The peak of each step that was measured, what it was made of, and the predicted peak."""
    predicted = int(log.end["predicted_peak_bytes"])
    measured = [entry for entry in log.steps if entry["allocated_bytes"] is not None]
    name, unit = _unit([predicted, *(entry["allocated_bytes"] for entry in measured)])
    lines = [_point(entry, "measured peak", entry["allocated_bytes"] / unit) for entry in measured]
    reserved = [entry for entry in log.steps if entry["reserved_bytes"] is not None]
    lines += [_point(entry, "reserved", entry["reserved_bytes"] / unit) for entry in reserved]
    lines += [
        {"step": step, "what": "predicted peak", "value": predicted / unit}
        for step in (1, log.end["steps"])
    ]
    parts = [
        {
            "step": entry["step"],
            "component": COMPONENTS[part],
            "order": order,
            "value": count / unit,
        }
        for entry in log.steps
        for order, (part, count) in enumerate(entry.get("component_bytes", {}).items())
    ]
    made_of = list(dict.fromkeys(row["component"] for row in parts))
    title = f"peak of the step ({name})"
    y = {"field": "value", "type": "quantitative", "title": title, "axis": {"tickCount": 5}}
    area: Spec = {
        "data": {"values": parts},
        "mark": {"type": "area", "opacity": 0.7, "point": "transparent"},
        "encoding": {
            "y": {**y, "stack": "zero"},
            "color": _color("component", made_of),
            "order": {"field": "order"},
            "tooltip": _tooltip("component", ",.2f"),
        },
    }
    dashes = {"measured peak": [1, 0], "predicted peak": [6, 4]}
    if reserved:
        dashes["reserved"] = [2, 3]
    across: Spec = {
        "mark": {"type": "line", "strokeWidth": 1.75, "point": "transparent"},
        "encoding": {
            "y": {**y, "stack": None},
            "strokeDash": {
                "field": "what",
                "type": "nominal",
                "scale": {"domain": list(dashes), "range": list(dashes.values())},
                "legend": {"title": None, "symbolType": "stroke"},
            },
            "tooltip": _tooltip("what", ",.2f"),
        },
    }
    layers = [area, across] if parts else [across]
    return _layers(lines, layers, height=260, x=_steps(log.end["steps"]))


def components(estimate: MemoryEstimate) -> Spec:
    """What the peak is made of, in the default plan and its neighbours."""
    plans = {"default plan": estimate.default, **estimate.neighbours}
    return _stacked(
        {title: found.components for title, found in plans.items()}, "predicted peak", 38
    )


def over_step(estimate: MemoryEstimate) -> Spec:
    """The default plan's step, stretch by stretch, and its peak."""
    stretches = [moment.components for moment in estimate.over_step]
    # names may be alike: each is told from the others by its place, which the axis does not show
    keyed = {f"{index:03} {m.name}": m.components for index, m in enumerate(estimate.over_step)}
    spec = _stacked(keyed, "predicted bytes", 24)
    axis = {"labelExpr": "slice(datum.label, 4)", "labelLimit": 210}
    spec["encoding"]["y"]["axis"] = axis
    _, unit = _unit([found.total for found in stretches])
    peak = estimate.default.peak_allocated_bytes / unit
    spec["layer"].append(
        {
            "data": {"values": [{"peak": peak}]},
            "mark": {"type": "rule", "strokeDash": [6, 4], "strokeWidth": 1.75},
            "encoding": {
                "x": {"field": "peak", "type": "quantitative"},
                "y": None,
                "tooltip": [{"field": "peak", "type": "quantitative", "title": "predicted peak"}],
            },
        }
    )
    return spec


def _stacked(bars: Mapping[str, Components], title: str, height: int) -> Spec:
    """A bar for each name, of what its bytes are for."""
    name, unit = _unit([found.total for found in bars.values()])
    rows = [
        {"bar": bar, "component": COMPONENTS[key], "order": position, "value": count / unit}
        for bar, found in bars.items()
        for position, (key, count) in enumerate(found.model_dump().items())
        if count
    ]
    used = [part for part in COMPONENTS.values() if any(r["component"] == part for r in rows)]
    layer = {
        "mark": {"type": "bar", "height": {"band": 0.62}},
        "encoding": {
            "x": {
                "field": "value",
                "type": "quantitative",
                "title": f"{title} ({name})",
                "axis": {"tickCount": 5},
            },
            "color": _color("component", used),
            "order": {"field": "order"},
            "tooltip": [
                {"field": "bar", "type": "nominal"},
                {"field": "component", "type": "nominal"},
                {"field": "value", "type": "quantitative", "format": ",.2f", "title": name},
            ],
        },
    }
    y: Spec = {"field": "bar", "type": "nominal", "sort": None, "title": None}
    y["axis"] = {"labelLimit": 150}
    return _layers(rows, [layer], y=y, height=height * len(bars))


def phases(default: Estimate, log: TrainingLog) -> Spec:
    """The peak of each phase of a step: predicted, and measured where it was."""
    measured = log.phase_bytes
    name, unit = _unit(list(default.phase_peak_bytes.values()))
    predicted = [(phase, "predicted", default.phase_peak_bytes.get(phase)) for phase in PHASES]
    found = [(phase, "measured", measured.get(phase)) for phase in PHASES]
    rows = [
        {"phase": PHASES[phase], "what": what, "value": count / unit}
        for phase, what, count in [*predicted, *found]
        if count is not None
    ]
    bars = {
        "mark": {"type": "bar", "cornerRadiusEnd": 2},
        "encoding": {
            "x": {
                "field": "value",
                "type": "quantitative",
                "title": f"peak ({name})",
                "axis": {"tickCount": 5},
            },
            "yOffset": {"field": "what", "sort": ["predicted", "measured"]},
            "color": _color("what", ["predicted", *["measured"] * bool(measured)]),
            "tooltip": [
                {"field": "phase", "type": "nominal"},
                {"field": "what", "type": "nominal"},
                {"field": "value", "type": "quantitative", "format": ",.2f", "title": name},
            ],
        },
    }
    shown = [
        title
        for phase, title in PHASES.items()
        if phase in default.phase_peak_bytes or phase in measured
    ]
    y: Spec = {"field": "phase", "type": "nominal", "sort": shown, "title": None}
    return _layers(rows, [bars], y=y, height=230)


# --- what they have in common ---------------------------------------------------------------------


def _point(entry: Mapping[str, Any], what: str, value: float) -> dict[str, Any]:
    return {"step": entry["step"], "what": what, "value": value}


def _steps(last: int) -> Spec:
    """The axis of optimizer steps."""
    return {
        "field": "step",
        "type": "quantitative",
        "title": "optimizer step",
        "axis": {"tickCount": 6, "format": "d", "grid": False},
        "scale": {"nice": False, "domain": [1, last]},
    }


def _tooltip(name: str, number: str) -> list[Spec]:
    """Of a point over the steps. name: the field that says what it is; number: its value's format."""
    return [
        {"field": "step", "type": "quantitative"},
        {"field": name, "type": "nominal"},
        {"field": "value", "type": "quantitative", "format": number},
    ]


def _over_steps(
    rows: Sequence[Mapping[str, Any]],
    encoding: Spec,
    number: str,
    *,
    last: int,
    lines: Sequence[tuple[str, float]] = (),
    points: Mapping[str, str] | None = None,
) -> Spec:
    """A line over the optimizer steps. last: step; points: a series with its points; lines: across."""
    tooltip = _tooltip("what", number)
    layers: list[Spec] = [
        {
            "mark": {"type": "line", "strokeWidth": 1.75, "interpolate": "linear"},
            "encoding": {**encoding, "tooltip": tooltip},
        }
    ]
    if points is not None:
        chosen = {"filter": {"field": "what", "equal": points["what"]}}
        layers.append(
            {
                "transform": [chosen],
                "mark": {"type": "point", "filled": True, "size": 45, "opacity": 1},
                "encoding": {**encoding, "tooltip": tooltip},
            }
        )
    for what, value in lines:
        layers.append(
            {
                "data": {"values": [{"what": what, "value": value}]},
                "mark": {"type": "rule", "strokeDash": [6, 4], "strokeWidth": 1.75},
                "encoding": {
                    "y": {"field": "value", "type": "quantitative"},
                    "color": encoding["color"],
                    "tooltip": tooltip[1:],
                },
            }
        )
    x = _steps(last)
    layers[0]["encoding"]["x"] = x
    if points is not None:
        layers[1]["encoding"]["x"] = x
    return _layers(rows, layers, height=230)


def _layers(
    rows: Sequence[Mapping[str, Any]], layers: Sequence[Spec], *, height: Any, **encoding: Spec
) -> Spec:
    return {
        "data": {"values": list(rows)},
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "encoding": encoding,
        "layer": list(layers),
    }


def _color(field: str, domain: Sequence[str], *, legend: bool = True) -> Spec:
    found: Spec = {
        "field": field,
        "type": "nominal",
        "sort": None,
        "scale": {"domain": list(domain)},
    }
    found["legend"] = {"title": None} if legend else None
    return found


def _scale(values: Sequence[float]) -> Spec:
    low, high = min(values), max(values)
    return {"type": "log"} if low > 0 and high / low > _WIDE else {"zero": True}


def _unit(counts: Sequence[int]) -> tuple[str, int]:
    return ("GiB", GIB) if max(counts) >= GIB else ("MiB", MIB)

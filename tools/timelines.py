"""Timelines of the algorithms, drawn from the short descriptions beside the pictures (``docs/pictures/*.txt``).

A description is lines of these kinds; times are in units that mean nothing but the order:

    title TEXT                      what is seen
    lanes NAME, NAME, ...           one lane each, from the top; or
    launches ALGORITHM RANKS DTYPE N   one lane for each of the N launches of a call, as the package plans them, with their buffers
    unit PIXELS                     of one unit of time
    stagger TIME                    how much later each lane begins than the one above it
    LANE FROM-TO KIND TEXT          a box; LANE is a number, "all", or "each" (all that no line names by number)
    exchange FROM TO                an arrow from every lane at FROM to every other one at TO
    next FROM TO TEXT               an arrow from every lane at FROM to the one below at TO, in the times of each
    note TEXT                       a line below

What a description cannot show is an error: boxes that overlap, arrows that go back in time, arrows that begin or end where there is
no box.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from canvas import KINDS, Canvas, wrapped

from allreduce_jit.policy import nvlink
from allreduce_jit.policy.catalogue import NVLINK_ALGORITHMS
from allreduce_jit.policy.operation import ITEMSIZE, all_reduce
from allreduce_jit.policy.plan import PACKET

LANE, BOX, LEFT, TOP, NOTE = 62, 30, 96, 48, 19


@dataclass
class Timeline:
    """What a description says; ``boxes``: (lane, from, to, kind, text), ``arrows``: (lane, from, lane, to, text), all in absolute times."""

    title: str = ""
    lanes: list[str] = field(default_factory=list)
    asides: list[str] = field(default_factory=list)
    unit: float = 60
    boxes: list[tuple[int, float, float, str, str]] = field(default_factory=list)
    arrows: list[tuple[int, float, int, float, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(text: str) -> Timeline:
    """The timeline of a description.

    Raises:
        ValueError: a line is none, or what it says cannot be.
    """
    found, stagger = Timeline(), 0.0
    lines = [line.split(" ", 1) for line in text.splitlines() if line.strip()]
    named = {int(word) for word, _ in lines if word.isdigit()}
    for word, rest in lines:
        if word == "title":
            found.title = rest
        elif word == "lanes":
            found.lanes = rest.split(", ")
        elif word == "launches":
            found.lanes, found.asides = _launches(*rest.split())
        elif word == "unit":
            found.unit = float(rest)
        elif word == "stagger":
            stagger = float(rest)
        elif word == "note":
            found.notes.append(rest)
        elif word == "exchange":
            begin, end = map(float, rest.split())
            every = range(len(found.lanes))
            found.arrows += [(a, begin, b, end, "") for a in every for b in every if a != b]
        elif word == "next":
            begin, end, *label = rest.split(" ", 2)
            for a in range(len(found.lanes) - 1):
                told = label[0] if label and a == 0 else ""
                found.arrows.append((a, float(begin) + a * stagger, a + 1, float(end) + (a + 1) * stagger, told))
        elif word in ("all", "each") or word.isdigit():
            span, kind, said = rest.split(" ", 2)
            begin, end = map(float, span.split("-"))
            every = range(len(found.lanes))
            lanes = [int(word)] if word.isdigit() else [a for a in every if word == "all" or a not in named]
            found.boxes += [(a, begin + a * stagger, end + a * stagger, kind, said) for a in lanes]
        else:
            raise ValueError(f"{word!r} begins no line of a timeline")
    _check(found)
    return found


def _check(found: Timeline) -> None:
    def inside(lane: int, time: float) -> bool:
        return any(a == lane and begin <= time <= end for a, begin, end, _, _ in found.boxes)

    for lane, name in enumerate(found.lanes):
        spans = sorted((begin, end) for a, begin, end, _, _ in found.boxes if a == lane)
        if not spans or any(end > begin for (_, end), (begin, _) in zip(spans, spans[1:])) or any(b >= e for b, e in spans):
            raise ValueError(f"{found.title}: {name} has no boxes, or boxes that overlap: {spans}")
    for a, begin, b, end, _ in found.arrows:
        if begin > end or not inside(a, begin) or not inside(b, end):
            raise ValueError(f"{found.title}: no arrow goes from lane {a} at {begin} to lane {b} at {end}")
    if unknown := {kind for *_, kind, _ in found.boxes} - set(KINDS):
        raise ValueError(f"{found.title}: {', '.join(unknown)}: expected kinds of {', '.join(KINDS)}")


def _launches(algorithm: str, ranks: str, dtype: str, count: str) -> tuple[list[str], list[str]]:
    """Names of a call's launches, and the buffers that the package gives to each."""
    world_size, what = int(ranks), NVLINK_ALGORITHMS[algorithm]
    bands = nvlink.make_bands(world_size)
    layout = nvlink.make_layout(world_size, 32 << 20, bands)
    packets = int(count) * min(layout.regions[algorithm].capacity, nvlink.RESIDENT_PACKETS)
    spec = all_reduce(dtype, packets * PACKET * (world_size if what.parts else 1) // ITEMSIZE[dtype])
    block = next(band.block for band in bands if band.algorithm == algorithm)
    planned = nvlink.launches(nvlink.plan_of(algorithm, block, spec, world_size, layout), spec, world_size)
    if len(planned) != int(count):
        raise ValueError(f"{algorithm}: no call has {count} launches ({len(planned)} instead)")
    told = [dict(launch.arguments) for launch in planned]
    return [f"launch {one['launch']}" for one in told], [f"{one['scatter']}, {one['gather']}" for one in told]


def draw(found: Timeline) -> str:
    """Its picture."""
    end = max(end for _, _, end, _, _ in found.boxes)
    right = 130 if found.asides else 20
    width = round(LEFT + end * found.unit + right)
    lines = [part for note in found.notes for part in wrapped(note, int((width - 40) / 6.2))]
    bottom = TOP + LANE * len(found.lanes)
    picture = Canvas(width, round(bottom + NOTE * len(lines) + 12), found.title)
    picture.write(16, 26, found.title, "title")
    if found.asides:
        picture.write(width - 16, 44, "buffers: scatter, gather", "soft end")

    def y(lane: int) -> float:
        return TOP + LANE * lane + LANE / 2

    def x(time: float) -> float:
        return LEFT + time * found.unit

    for lane, name in enumerate(found.lanes):
        picture.write(16, y(lane) + 4, name, "name")
        picture.line([(LEFT, y(lane)), (width - right, y(lane))])
    for lane, aside in enumerate(found.asides):
        picture.write(width - 16, y(lane) + 4, aside, "end")
    labels = 0
    for a, begin, b, stop, text in found.arrows:  # behind the boxes, of which some are in between
        side = BOX / 2 if b > a else -BOX / 2
        picture.arrow(x(begin), y(a) + side, x(stop), y(b) - side)
        if text:  # of the first kind of arrow to its left, of others to its right
            picture.write(x(begin) + (6 if labels else -6), y(a) + BOX / 2 + 13, text, "soft" if labels else "soft end")
            labels += 1
    for lane, begin, stop, kind, text in found.boxes:
        picture.box(x(begin), y(lane) - BOX / 2, (stop - begin) * found.unit, BOX, KINDS[kind], f"{found.lanes[lane]}: {text}")
        parts = wrapped(text, max(4, int((stop - begin) * found.unit / 6.4)))
        for i, part in enumerate(parts):
            at = y(lane) + 4 + (i - (len(parts) - 1) / 2) * 13
            picture.write(x((begin + stop) / 2), at, part, "middle soft" if len(parts) > 1 else "middle")
    for i, line in enumerate(lines):
        picture.write(16, bottom + 14 + NOTE * i, line, "soft")
    return picture.text()

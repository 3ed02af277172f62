"""Reads what nvdisasm prints: instructions, the ways through a kernel, and the cheapest one.

A kernel holds code for every row; a given row takes one way through it. `cheapest` finds, among the
ways once round a loop (or through the whole kernel) that meet given instructions often enough, the
one with the fewest instructions: for "two square roots, two loads, a store" that is a row which
makes four normals, reads the state and the network's output, and writes the state.
"""

import heapq
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P[T\d]+)\s+)?([A-Z][\w.]*)\s*(.*?);"
)
_LABEL = re.compile(r"^(\.L_[\w.]+):")
_FUNCTION = re.compile(r"^//-+ \.text\.(\S+) -+")
_TARGET = re.compile(r"`\((\.L_[\w.]+)\)")
_PREDICATE = re.compile(r"(?:^|\s)!?U?P\d")
SLOW_CALL = 200
"""What a call counts: slow paths of divisions and square roots, which usual values do not take."""


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".", 1)[0]


@dataclass
class Block:
    """Instructions that run one after another, and where control may go behind them."""

    label: str
    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


# The unit that executes an instruction: what it is limited by. Sources: see cuda_static.LIMITS.
_CLASSES = {
    "FP32": "FADD FMUL FFMA FSETP FSEL FMNMX FSET FCHK FSWZADD HFMA2 HADD2 HMUL2".split(),
    "FP64": "DADD DMUL DFMA DSETP DMNMX".split(),
    "XU": "MUFU I2F F2I F2F FRND POPC BREV FLO".split(),
    "multiply": "IMAD XMAD".split(),
    "integer": (
        "IADD3 IADD VIADD LOP3 LOP ISETP SEL LEA SHF MOV PRMT IABS IMNMX VIMNMX PLOP3 P2R R2P "
        "CS2R S2R S2UR I2FP F2FP SGXT BMSK I2I VABSDIFF VOTE R2UR ISCADD"
    ).split(),
    "memory": "LDG STG LDS STS LDC LDL STL LD ST ATOM ATOMG ATOMS RED SHFL LDSM MEMBAR".split(),
    "control": (
        "BRA BRX BSSY BSYNC BREAK CALL RET EXIT BAR WARPSYNC NOP YIELD ERRBAR DEPBAR CCTL NANOSLEEP"
    ).split(),
}
_CLASS_OF = {name: kind for kind, names in _CLASSES.items() for name in names}


def class_of(i: Instruction) -> str:
    if i.opcode.startswith(("IMAD.WIDE", "IMAD.HI")):
        return "wide multiply"
    if i.opcode.startswith("IMAD.MOV") or i.name == "UMOV":
        return "integer" if i.name == "IMAD" else "uniform"
    return _CLASS_OF.get(i.name, "uniform" if i.name.startswith("U") else "other")


def functions(text: str) -> dict[str, str]:
    """The code of each kernel by its mangled name."""
    parts: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if found := _FUNCTION.match(line):
            name = found[1]
            parts[name] = []
        elif line.startswith("//-"):
            name = ""
        elif name:
            parts[name].append(line)
    return {key: "\n".join(lines) for key, lines in parts.items()}


def blocks(code: str) -> list[Block]:
    """Basic blocks in the order of their addresses, joined to their successors."""
    out = [Block("")]
    targets: list[list[str]] = [[]]
    falls: list[bool] = [True]

    def start(label: str) -> None:
        if out[-1].instructions or out[-1].label:
            out.append(Block(label))
            targets.append([])
            falls.append(True)
        else:
            out[-1].label = label

    ended = False
    for line in code.splitlines():
        if found := _LABEL.match(line):
            start(found[1])
            ended = False
            continue
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        if ended:
            start("")
        i = Instruction(int(found[1], 16), found[2] or "", found[3], found[4].strip())
        out[-1].instructions.append(i)
        ended = i.name in ("BRA", "BRX", "EXIT", "RET")
        if ended:
            named = _TARGET.findall(i.operands) if i.name == "BRA" else []
            if i.name == "BRX" and "BRANCH_TARGETS" in line:
                named = re.findall(r"\.L_[\w.]+", line.split("BRANCH_TARGETS", 1)[1])
            targets[-1] = named
            own = i.operands.split("`", 1)[0]
            falls[-1] = bool(i.predicate) or (i.name == "BRA" and bool(_PREDICATE.search(own)))
    place = {b.label: n for n, b in enumerate(out) if b.label}
    for n, b in enumerate(out):
        b.successors = [place[t] for t in targets[n] if t in place]
        if falls[n] and n + 1 < len(out):
            b.successors.append(n + 1)
    return out


def loops(graph: list[Block]) -> Iterator[tuple[int, int]]:
    """(head, last) of every backward branch, in block numbers."""
    for n, b in enumerate(graph):
        yield from ((s, n) for s in b.successors if s <= n and s != n)


def _cost(b: Block) -> int:
    return sum(SLOW_CALL if i.name == "CALL" else 1 for i in b.instructions)


def cheapest(
    graph: list[Block], needs: dict[str, int], first: int, last: int
) -> list[Instruction] | None:
    """The instructions of the cheapest way from block `first` to the end of block `last` that meets
    every opcode prefix in `needs` at least so often; None where there is no such way."""
    names = list(needs)
    goal = tuple(needs.values())

    def met(b: Block, so_far: tuple[int, ...]) -> tuple[int, ...]:
        counts = (sum(i.opcode.startswith(n) for i in b.instructions) for n in names)
        return tuple(min(g, s + c) for g, s, c in zip(goal, so_far, counts, strict=True))

    begin = (first, met(graph[first], (0,) * len(goal)))
    best = {begin: _cost(graph[first])}
    came: dict[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]]] = {}
    queue = [(best[begin], begin)]
    while queue:
        cost, state = heapq.heappop(queue)
        if cost > best[state]:
            continue
        n, have = state
        if n == last and have == goal:
            way = [state]
            while way[-1] in came:
                way.append(came[way[-1]])
            return [i for node, _ in reversed(way) for i in graph[node].instructions]
        for s in graph[n].successors:
            if not n < s <= last:  # forward only: once round
                continue
            following = (s, met(graph[s], have))
            if cost + _cost(graph[s]) < best.get(following, 1 << 60):
                best[following] = cost + _cost(graph[s])
                came[following] = state
                heapq.heappush(queue, (best[following], following))
    return None


def hot_way(code: str, needs: dict[str, int]) -> tuple[list[Instruction], bool] | None:
    """The cheapest way round the innermost loop that has one, and True; without such a loop,
    through the whole kernel, and False. None where the kernel cannot meet `needs`."""
    graph = blocks(code)
    for head, end in sorted(loops(graph), key=lambda loop: loop[1] - loop[0]):
        if way := cheapest(graph, needs, head, end):
            return way, True
    ends = [n for n, b in enumerate(graph) if b.instructions and not b.successors]
    ways = [w for n in ends if (w := cheapest(graph, needs, 0, n)) is not None]
    return (min(ways, key=len), False) if ways else None


def by_class(way: list[Instruction]) -> dict[str, int]:
    return dict(sorted(Counter(map(class_of, way)).items()))

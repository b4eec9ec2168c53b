"""State machines as data: each maps a state to the states that may follow it."""

from collections.abc import Mapping

from supercloud.model.errors import BadState

Transitions = Mapping[str, frozenset[str]]


def _table(**rows: str) -> Transitions:
    table = {state: frozenset(following.split()) for state, following in rows.items()}
    unknown = {to for row in table.values() for to in row} - table.keys()
    if unknown:
        raise ValueError(f"states without a row: {sorted(unknown)}")
    return table


# A virtual machine on a host, as its VMM and user domain see it.
MACHINE = _table(
    creating="starting failed deleting",
    starting="running failed deleting",
    running="paused stopping stopped failed deleting wedged",
    paused="running stopping failed deleting",
    wedged="running failed stopping deleting",
    stopping="stopped failed deleting",
    stopped="starting deleting",
    failed="deleting starting",
    deleting="gone failed",
    gone="",
)

# An L1 platform, as the control plane sees it.
PLATFORM = _table(
    pending="creating deleting",
    creating="booting failed deleting",
    booting="ready failed deleting",
    ready="lost booting failed deleting",
    lost="ready booting failed deleting",
    failed="creating deleting",
    deleting="gone failed",
    gone="",
)

# An execution environment.
ENVIRONMENT = _table(
    pending="preparing deleting failed",
    preparing="placed failed deleting pending",
    placed="starting failed deleting pending",
    starting="running failed exited deleting pending",
    running="serving unready exited failed deleting lost pending",
    serving="unready running exited failed deleting lost pending",
    unready="serving running exited failed deleting lost pending",
    exited="starting deleting pending",
    lost="running serving unready exited failed starting deleting pending",
    failed="starting pending preparing deleting",
    deleting="gone failed",
    gone="",
)

# A volume on a host, as its user domain sees it: not in use, opened and its epoch not yet kept
# by its owner, usable, part of a running platform.
VOLUME = _table(
    closed="opened failed deleting",
    opened="served closed failed deleting",
    served="attached closed failed deleting",
    attached="served closed failed deleting",
    failed="opened closed deleting",
    deleting="gone failed",
    gone="",
)

# A volume of a U-Cloud, as the control plane sees it: to be made; being opened; usable by its host;
# in a platform; being closed; with its data on the provider's disk, and nobody uses it.
# ``failed`` waits for its user when that is said in its document.
KEPT_VOLUME = _table(
    pending="opening failed deleting",
    opening="served closing failed deleting",
    served="attached opening closing failed deleting",
    attached="served opening failed deleting",
    closing="kept opening failed deleting",
    kept="opening failed deleting",
    failed="opening closing kept deleting",
    deleting="gone failed",
    gone="",
)

# A U-Cloud's object store on a host, as its user domain sees it: none; its data on the disk, and
# nobody serves it; its server starts, serves, is started again after it died; it serves no more.
STORE = _table(
    absent="stopped",
    stopped="starting absent",
    starting="ready restarting failed stopped absent",
    ready="restarting failed stopped absent",
    restarting="starting ready failed stopped absent",
    failed="stopped absent",
)

# The same, as the control plane sees it: to be made; on its way; serving; on its way to rest; with
# its data on the provider's disk, and nobody uses it.
KEPT_STORE = _table(
    pending="starting failed deleting",
    starting="ready stopping failed deleting",
    ready="starting stopping failed deleting",
    stopping="kept starting failed deleting",
    kept="starting failed deleting",
    failed="starting ready stopping kept deleting",
    deleting="gone failed",
    gone="",
)

# The checkpoints of an EE or a platform, as the control plane sees them: waiting for the time or to
# be asked; one being taken; the last one failed, and it is tried again; what is there is kept, and
# no more are taken.
CHECKPOINTS = _table(
    waiting="taking failed kept deleting",
    taking="waiting failed kept deleting",
    failed="taking waiting kept deleting",
    kept="waiting deleting",
    deleting="gone",
    gone="",
)

# A U-Cloud.
UCLOUD = _table(
    applying="ready degraded deleting",
    ready="applying degraded deleting",
    degraded="applying ready deleting",
    deleting="gone",
    gone="applying",
)


def step(table: Transitions, state: str, to: str) -> str:
    """Go from ``state`` to ``to``: returns it. Staying is always allowed.

    Raises BadState when the table does not allow it.
    """
    if to != state and to not in table[state]:
        raise BadState(f"cannot go from {state} to {to}", details={"state": state, "to": to})
    return to


def observed(table: Transitions, state: str, to: str) -> str:
    """``to``, if the table has a way there from ``state``, be it over others.

    What is observed was sampled: the states in between went by unseen. Raises BadState when there
    is no way.
    """
    known, border = {state}, {state}
    while border and to not in known:
        border = {following for one in border for following in table[one]} - known
        known |= border
    if to not in known:
        raise BadState(f"cannot get from {state} to {to}", details={"state": state, "to": to})
    return to

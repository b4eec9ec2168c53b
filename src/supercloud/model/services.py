"""What is said of a U-Cloud's services as a whole: part of its resources (``model.resources``)."""

from dataclasses import dataclass, fields

from supercloud.model.rules import NAME, Rule, declared

_LABEL = "lower case letters, digits and '-', at most 63, not '-' at either end"


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectStore:
    """Where the object store may be made, with all buckets and checkpoints.

    All of these are conditions; none given: where what first uses it is placed. What uses a bucket
    goes to the store; checkpoints also go there from elsewhere, through a tunnel. A store that is
    there is not moved.
    """

    provider: str = declared(
        Rule(doc="only at the provider of this name", pattern=f"({NAME})?", wanted=_LABEL), ""
    )
    region: str = declared(Rule(doc="only in this region", pattern=f"({NAME})?", wanted=_LABEL), "")
    jurisdiction: str = declared(Rule(doc="only under this law", max_length=63), "")

    def refused(self, provider: str, region: str, jurisdiction: str) -> str:
        """Why it may not be there, or ``""``."""
        there = {"provider": provider, "region": region, "jurisdiction": jurisdiction}
        wanted = {item.name: getattr(self, item.name) for item in fields(self)}
        for name, value in wanted.items():
            if value and value != there[name]:
                return f"services.objects wants {name} {value}"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The U-Cloud's own services, which run as soon as something uses them.

    Volumes, buckets and `checkpoint` say what block storage, replication, objects and checkpoints
    are to do; here is what is said of a service as a whole.
    """

    objects: ObjectStore = declared(Rule(doc="its object store"), factory=ObjectStore)

"""How each tensor of a model can be cut: by role, head, row, column, expert or entry.

What the tensors are is in :mod:`hessian_tools.blocks.kinds`. Every role of a fused query/key/value
tensor is cut by the rule of its own kind.
"""

from collections.abc import Iterator, Mapping

from hessian_tools.blocks.block import Cut
from hessian_tools.blocks.kinds import CONVOLUTIONS, TRANSPOSED, Anatomy, Site
from hessian_tools.blocks.projection import Projection, is_transposed

# Ways to cut a tensor by its kind's rule.
WAYS: dict[str, str] = {
    "whole": "one block",
    "roles": "query, key and value of a fused tensor apart",
    "heads": "these by head (an output projection by the heads it reads); what has none by roles",
    "rows": "a block an output neuron, output channel or token, within its role and expert; "
    "vectors by roles",
    "elements": "every entry by itself",
    "skip": "left out",
}
_COUNTERS = {"heads": "head", "rows": "row"}  # of a region of a projection, by the way it is cut

Rules = Mapping[str, str]  # a way of WAYS by kind of KINDS, "vector" (fewer than 2 axes) or "else"


class Survey(Anatomy):
    """What presets may know of a model, and how they cut it."""

    def cuts(self, site: Site, rules: Rules) -> list[Cut]:
        """Cuts of one tensor: each of its roles in the way that ``rules`` has for its kind.

        Rules for "vector" hold for tensors of fewer than two dimensions without a rule of their
        kind, those for "else" where nothing else does.
        """
        projection = None
        if rules != {"else": "whole"}:  # then no look at the attention is needed
            projection = self.attention.projections.get(site.name)
        ways = self._ways(site, rules, projection)
        if len(set(ways.values())) == 1:
            way = next(iter(ways.values()))
            if way == "skip":
                return []
            if way == "elements":
                return [self.elements(site)]
            if way == "whole":
                return [site.uncut()]
        if projection is None or (projection.roles == ("o",) and ways["o"] != "heads"):
            return [self.rows(site) if "rows" in ways.values() else site.uncut()]
        return self._by_roles(site, projection, ways)

    def _ways(self, site: Site, rules: Rules, projection: Projection | None) -> dict[str, str]:
        """The way of each role of the tensor; without a projection, of "" alone."""
        asks_for_kinds = bool(rules.keys() - {"vector", "else"})
        roles = projection.roles if projection else ("",)
        ways = {}
        for role in roles:
            kind = self.kinds[site.name] if asks_for_kinds else ""
            if asks_for_kinds and projection and not site.is_vector:
                kind = role
            way = rules.get(kind)
            if way is None and site.is_vector:
                way = rules.get("vector")
            way = way or rules["else"]
            # the rows of a vector are its entries; its roles are what may differ
            ways[role] = "roles" if way == "rows" and site.is_vector else way
        return ways

    def _by_roles(self, site: Site, projection: Projection, ways: dict[str, str]) -> list[Cut]:
        """Runs of roles that are cut alike, each in its way."""
        if "heads" in ways.values() and not projection.head_size:
            features = sum(projection.sizes)
            self.notes.append(
                f"{site.name}: its {features} features are not known to divide into heads"
            )
            ways = {role: "roles" if way == "heads" else way for role, way in ways.items()}
        axis = _feature_axis(site, projection)
        cuts = []
        for way in dict.fromkeys(ways.values()):
            counter = _COUNTERS.get(way, "")
            chosen = [role for role in projection.roles if ways[role] == way]
            regions = projection.regions(counter, chosen)
            cuts += [site.cut(axis, region, counter) for region in regions]
        return cuts

    def rows(self, site: Site) -> Cut:
        """By output; whole, with a note, where that is not known."""
        cut = dict(self._feature_cuts(site)).get("rows")
        if cut is not None:
            return cut
        kind = type(site.module).__name__
        self.notes.append(f"{site.name}: a {kind} has no known output axis, so it is left whole")
        return site.uncut()

    def elements(self, site: Site) -> Cut:
        return site.along(tuple(range(len(site.shape))), "element")

    def equal_cuts(self, site: Site) -> Iterator[tuple[str, Cut]]:
        """(what it follows, cut) of every way to cut the whole tensor into blocks of one size."""
        yield "whole", site.uncut()
        projection = self.attention.projections.get(site.name)
        if projection is not None:
            axis = _feature_axis(site, projection)
            several = len(projection.roles) > 1
            if several and len(set(projection.sizes)) == 1:
                yield "roles", site.cut(axis, next(projection.regions("", projection.roles)))
            if projection.head_size:
                yield "heads", site.cut(axis, projection.heads(), "" if several else "head")
        yield from self._feature_cuts(site)
        yield "elements", self.elements(site)

    def _feature_cuts(self, site: Site) -> Iterator[tuple[str, Cut]]:
        """By output ("rows") and by input ("columns"); by each axis where these are not known."""
        if site.is_vector:
            return
        if isinstance(site.module, CONVOLUTIONS):
            yield from _convolution_cuts(site)
            return
        outputs = self.row_axes(site)
        if not outputs:
            for axis in range(len(site.shape)):
                yield f"axis {axis}", site.along((axis,), f"axis{axis}")
            return
        inputs = tuple(axis for axis in range(len(site.shape)) if axis != outputs[-1])
        if len(outputs) > 1:
            yield "experts", site.along((0,), "expert")
        yield "rows", site.along(outputs, "row")
        yield "columns", site.along(inputs, "column")


def _feature_axis(site: Site, projection: Projection) -> int:
    """The tensor's axis that the projection's features lie on.

    An output projection's features are its inputs.
    """
    is_turned = not site.is_vector and is_transposed(site.module)
    is_output = projection.roles == ("o",)
    return int(is_turned != is_output)


def _convolution_cuts(site: Site) -> Iterator[tuple[str, Cut]]:
    groups = site.module.groups
    assert isinstance(groups, int)  # of every convolution
    view = (groups, site.shape[0] // groups, *site.shape[1:])
    if isinstance(site.module, TRANSPOSED):  # (in, out / groups, ...)
        yield "rows", site.along((0, 2), "row", view)
        yield "columns", site.along((0,), "column")
    else:  # (out, in / groups, ...)
        yield "rows", site.along((0,), "row")
        yield "columns", site.along((0, 2), "column", view)

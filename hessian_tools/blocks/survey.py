"""How each tensor of a model can be cut: by role, head, row, column, expert or entry.

What the tensors are is in :mod:`hessian_tools.blocks.kinds`. Every role of a fused query/key/value
tensor is cut by the rule of that role's kind.
"""

from collections.abc import Iterator, Mapping

from hessian_tools.blocks.block import Cut
from hessian_tools.blocks.kinds import CONVOLUTIONS, TRANSPOSED, Anatomy, Site
from hessian_tools.blocks.projection import Heads, Projection

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
        """Cuts of one tensor: each of its roles in the way that ``rules`` has for its kind."""
        projection = None
        # Finding the attention modules means running them: not for rules that ask for nothing.
        if rules != {"else": "whole"}:
            projection = self.attention.projections.get(site.name)
        roles = projection.roles if projection else ("",)
        ways = {role: self._way(site, role, rules) for role in roles}
        common = set(ways.values())
        if common == {"skip"}:
            return []
        if common == {"elements"}:
            return [self.elements(site)]
        if common == {"whole"}:
            return [site.uncut()]
        # The rows of an output projection are its outputs; only its heads lie along its inputs. And
        # what has no role has no rows but those of its module.
        has_heads_alone = roles in (("o",), ("",)) and common != {"heads"}
        if projection is None or has_heads_alone:
            return [self.rows(site) if "rows" in common else site.uncut()]
        return self._by_roles(site, projection, ways)

    def _way(self, site: Site, role: str, rules: Rules) -> str:
        """How one role of a tensor is cut; ``role`` is "" for a tensor without known roles.

        The rule for its kind counts first, then "vector" for a tensor of fewer than two dimensions,
        then "else".
        """
        names = []
        # Kinds are learnt by trial runs, which rules that name none do not need.
        if rules.keys() - {"vector", "else"}:
            has_role = role and not site.is_vector
            names.append(role if has_role else self.kinds[site.name])
        if site.is_vector:
            names.append("vector")
        names.append("else")
        way = next(rules[name] for name in names if name in rules)
        # A row of a vector would be one entry: its roles are the finest blocks by output.
        return "roles" if way == "rows" and site.is_vector else way

    def _by_roles(self, site: Site, projection: Projection, ways: dict[str, str]) -> list[Cut]:
        """Roles that are cut alike together, each in its way.

        A way that is neither "heads" nor "rows" takes a role as one block.
        """
        if "heads" in ways.values() and not projection.head_sizes:
            features = sum(projection.sizes)
            self.notes.append(
                f"{site.name}: its {features} features are not known to divide into heads"
            )
            for role in projection.roles:
                if ways[role] == "heads":
                    ways[role] = "roles"
        axis = _feature_axis(site, projection)
        cuts = []
        for way in dict.fromkeys(ways.values()):
            counter = _COUNTERS.get(way, "")
            chosen = [role for role in projection.roles if ways[role] == way]
            regions = projection.regions(counter, chosen)
            cuts += [site.cut(axis, region, counter) for region in regions]
        return cuts

    def stated(self, site: Site, heads: Heads) -> list[Cut]:
        """``site`` cut by the heads that a user states.

        Raises ValueError where they do not fit.
        """
        stated = heads.projection(site.name, site.shape)
        told = self.attention.projections.get(site.name)
        if told is not None and told.head_sizes and told.head_sizes != stated.head_sizes:
            self.notes.append(
                f"{site.name}: cut by {heads} as stated, in heads of {_sizes(stated)}; its module "
                f"computes with heads of {_sizes(told)}"
            )
        return self._by_roles(site, stated, dict.fromkeys(stated.roles, "heads"))

    def rows(self, site: Site) -> Cut:
        """By output; whole, with a note, where that is not known."""
        cut = dict(self._feature_cuts(site)).get("rows")
        if cut is not None:
            return cut
        kind = type(site.module).__name__
        self.notes.append(f"{site.name}: a {kind} has no known output axis, so it is left whole")
        return site.uncut()

    def elements(self, site: Site) -> Cut:
        """Every entry by itself."""
        return site.along(tuple(range(len(site.shape))), "element")

    def equal_cuts(self, site: Site) -> Iterator[tuple[str, Cut]]:
        """(what it follows, cut) of every way to cut the whole tensor into blocks of one size."""
        yield "whole", site.uncut()
        projection = self.attention.projections.get(site.name)
        if projection is not None:
            axis = _feature_axis(site, projection)
            if projection.is_fused and len(set(projection.sizes)) == 1:
                (region,) = projection.regions("", projection.roles)
                yield "roles", site.cut(axis, region)
            if projection.head_size:
                # The heads of a fused tensor have names with their roles instead of a number.
                counter = "" if projection.is_fused else "head"
                yield "heads", site.cut(axis, projection.heads(), counter)
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
        every = range(len(site.shape))
        inputs = tuple(axis for axis in every if axis != outputs[-1])
        if len(outputs) > 1:
            yield "experts", site.along((0,), "expert")
        yield "rows", site.along(outputs, "row")
        yield "columns", site.along(inputs, "column")


def _feature_axis(site: Site, projection: Projection) -> int:
    """The tensor's axis that the projection's features lie on.

    An output projection's features are its inputs.
    """
    if projection.axis is not None:
        return projection.axis
    is_output = projection.roles == ("o",)
    return int(site.is_transposed != is_output)


def _sizes(projection: Projection) -> str:
    return " and ".join(str(size) for size in dict.fromkeys(projection.head_sizes))


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

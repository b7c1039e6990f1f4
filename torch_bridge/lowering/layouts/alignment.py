"""Broadcasting between values of different layouts: one common layout, into which the cheapest operand moves."""

from collections.abc import Sequence

from torch_bridge.lowering.layouts.layout import Atom, Group, Layout, atoms_of, refinement, replace_atoms, tidy_axes


def pad_rank(layout: Layout, rank: int) -> Layout:
    """The layout with dimensions of size one in front, as broadcasting adds them."""
    return Layout(((),) * (rank - len(layout.dims)) + layout.dims, layout.axes)


def renew_atoms(layout: Layout) -> Layout:
    """The layout with new atoms, which no other layout shares."""
    parts = {atom: (Atom(atom.size),) for atom in atoms_of(layout.dims)}
    return Layout(replace_atoms(layout.dims, parts), replace_atoms(layout.axes, parts))


def refine_layout(layout: Layout, parts: dict[Atom, Group]) -> Layout:
    """The layout with atoms split into the given parts."""
    return Layout(replace_atoms(layout.dims, parts), replace_atoms(layout.axes, parts))


def unify_layouts(layouts: Sequence[Layout]) -> list[Layout] | None:
    """Layouts of equal rank in common atoms, or None where their dimensions are cut incompatibly."""
    result = [renew_atoms(layout) for layout in layouts]
    for column in range(len(result[0].dims)):
        for k in range(len(result)):
            lead = next((other for other in result if other.dims[column]), None)
            if lead is None or lead is result[k] or not result[k].dims[column]:
                continue
            parts = refinement(lead.dims[column], result[k].dims[column])
            if parts is None:
                return None
            first, second = parts
            result[k] = refine_layout(result[k], second)
            result = [refine_layout(layout, first) for layout in result]
    return result


def common_axes(layouts: Sequence[Layout], lead: int) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
    """The dims of the broadcast result, and its axes: the axes of `layouts[lead]` as far as they reach."""
    dims = tuple(
        next((dim for dim in column if dim), ()) for column in zip(*(layout.dims for layout in layouts), strict=True)
    )
    if set(atoms_of(dims)) == set(atoms_of(layouts[lead].dims)):
        axes = layouts[lead].axes
    else:
        axes = _widen_axes(layouts[lead], dims)
    for layout in layouts:
        axes = _cut_axes(axes, set(atoms_of(layout.dims)))
    return dims, axes


def operand_axes(layout: Layout, axes: Sequence[Group]) -> tuple[Group, ...]:
    """The axes in which an operand is stored to broadcast against an array that is stored as `axes`."""
    if layout.axes == tuple(axes):
        return layout.axes
    own = set(atoms_of(layout.dims))
    target = [axis if axis and set(axis) <= own else () for axis in axes]
    while target and not target[0]:
        target.pop(0)
    return tuple(target)


def _widen_axes(layout: Layout, dims: Sequence[Group]) -> tuple[Group, ...]:
    """One axis per dimension in the order of `layout`, including the dimensions that it lacks."""
    axes = tidy_axes(layout)
    spare = iter([k for k, axis in enumerate(axes) if not axis])
    place = [axes.index(dim) if dim else next(spare) for dim in layout.dims]
    order = sorted(range(len(dims)), key=lambda dim: place[dim])
    return tuple(dims[dim] for dim in order)


def _cut_axes(axes: Sequence[Group], atoms: set[Atom]) -> tuple[Group, ...]:
    """The axes, cut into runs that lie wholly inside or wholly outside of `atoms`."""
    result: list[Group] = []
    for axis in axes:
        run: list[Atom] = []
        for atom in axis:
            if run and (run[-1] in atoms) != (atom in atoms):
                result.append(tuple(run))
                run = []
            run.append(atom)
        result.append(tuple(run))
    return tuple(result)

"""The variables of a Saver: the set of their names is fixed, all else is looked at anew at every save and restore."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpusaver.bundle.bulk import collector_paused
from gpusaver.exporting import PlanDescription, SaverOptions
from gpusaver.pipeline.plan import Plan, Save, plan_save
from gpusaver.variables import Leaves, NameOrder, check_variables_once, flatten


class SaverVariables:
    """Of one var_list: its leaves, and how they were last planned and described.  For one thread at a time.

    ``frozen(leaves)``: names of the variables that get data files of their own.
    Raises TypeError for what cannot be stored, ValueError for names given twice.
    """

    def __init__(self, var_list: Any, options: SaverOptions, frozen: Callable[[Leaves], frozenset[str]]) -> None:
        self._var_list = var_list
        self._options = options
        self._frozen = frozen
        self._order = NameOrder()
        self._plan: Plan | None = None
        self._description: PlanDescription | None = None
        leaves = flatten(var_list, self._order)
        check_variables_once(leaves)
        self._names = leaves.names
        self.plan(leaves)  # finds every leaf that cannot be stored

    def __len__(self) -> int:
        return len(self._names)

    @collector_paused()
    def leaves(self) -> Leaves:
        """As they are now.  Raises ValueError if their names are others."""
        leaves = flatten(self._var_list, self._order)
        if leaves.names != self._names:
            before, now = set(self._names), set(leaves.names)
            raise ValueError(
                "the set of variable names changed since the Saver was made: "
                f"new {sorted(now - before)[:10]}, gone {sorted(before - now)[:10]}; make a new Saver for a new set"
            )
        leaves.names = self._names  # so that the plan keeps no others
        return leaves

    def plan(self, leaves: Leaves) -> Save:
        """How they are saved; as the last time, if that still fits."""
        save = plan_save(leaves, sharded=self._options.sharded, cached=self._plan, frozen=self._frozen(leaves))
        self._plan = save.plan
        return save

    def description(self, leaves: Leaves, plan: Plan) -> PlanDescription:
        """What `.meta` files say of them; the last one, if that still fits."""
        if self._description is None or not self._description.fits(plan, leaves):
            self._description = PlanDescription(plan, leaves, self._options)
        return self._description

    def forget(self) -> None:
        """Frees what is kept from one time to the next."""
        self._plan = self._description = None

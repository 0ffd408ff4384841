"""TPE over the feasible part of a space: refused samples are redrawn or repaired, and never become trials."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from tuner.space.census import points_left
from tuner.space.core import Config, Problem, Space, Value
from tuner.targets import Target

STARTUP_TRIALS = 12
_REDRAWS = 4
_REPAIR_STEPS = 40
_FRESH_TRIES = 200
_STUCK = 6
"""Repairs in a row that find nothing allowed, after which there is taken to be nothing."""
_ENUMERABLE = 50_000

Params = tuple[tuple[str, Value], ...]


def distributions(space: Space) -> dict[str, CategoricalDistribution]:
    """Optuna's form of the axes. Always those of the unrestricted space: trials of one study must agree on them."""
    return {a.name: CategoricalDistribution(a.values) for a in space.axes}


def params_of(space: Space, values: dict[str, Any]) -> Params:
    """``values`` as ``Config.params``: what identifies a configuration within a study."""
    return tuple((a.name, values[a.name]) for a in space.axes)


class FeasibleSampler(BaseSampler):
    """Draws from TPE (at random for the first trials) until a point is allowed and new, then from its neighbourhood.

    ``space`` holds the constraints, ``allowed`` is the same with the user's restrictions, ``refused`` counts
    constraint -> samples it refused. Optuna calls it once per trial; enqueued trials keep the values they came with.
    When nothing new is left it returns a point that was tried before, which the caller recognises.
    """

    def __init__(
        self, space: Space, allowed: Space, problem: Problem, target: Target, seed: int, refused: Counter[str]
    ) -> None:
        self._space, self._allowed, self._problem, self._target = space, allowed, problem, target
        self._refused = refused
        self._random = random.Random(seed)
        with warnings.catch_warnings():
            # Choosing axes jointly is what this space needs; that the option may change one day is no news to a user.
            warnings.simplefilter("ignore", ExperimentalWarning)
            self._tpe = TPESampler(
                seed=seed,
                multivariate=True,
                constant_liar=True,  # trials of this batch and of other workers are still running
                n_startup_trials=STARTUP_TRIALS,
            )

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {n: d for n, d in distributions(self._space).items() if not d.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if "fixed_params" in trial.system_attrs:
            return {}
        seen = self._seen(study)
        values: dict[str, Value] = {}
        for _ in range(_REDRAWS):
            proposal = self._tpe.sample_relative(study, trial, search_space)
            values = self._within(proposal) if proposal else self._draw()
            if self._feasible(values) and params_of(self._space, values) not in seen:
                return self._answer(values, search_space)
        stuck = 0
        for _ in range(_FRESH_TRIES):
            repaired = self._repair(dict(values))
            stuck = 0 if repaired else stuck + 1
            if stuck == _STUCK:
                break
            if repaired and params_of(self._space, repaired) not in seen:
                return self._answer(repaired, search_space)
            values = self._kick(values) if repaired else self._draw()
        return self._answer(self._untried(seen) or dict(next(iter(seen), ())) or values, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise AssertionError(f"{param_name} is drawn together with all other axes")

    def _answer(self, values: dict[str, Value], search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        return {n: values[n] for n in search_space}

    def _seen(self, study: Study) -> set[Params]:
        names = {a.name for a in self._space.axes}
        return {
            params_of(self._space, t.params)
            for t in study.get_trials(deepcopy=False)
            if (t.state != TrialState.FAIL or "failure" in t.user_attrs) and t.params.keys() >= names
        }

    def _draw(self) -> dict[str, Value]:
        return {a.name: self._random.choice(a.values) for a in self._allowed.axes}

    def _within(self, proposal: dict[str, Any]) -> dict[str, Value]:
        """``proposal`` completed, and moved into the user's restrictions."""
        drawn = self._draw()
        kept = {a.name: proposal[a.name] for a in self._allowed.axes if proposal.get(a.name) in a.values}
        return drawn | kept

    def _refusals(self, values: dict[str, Value]) -> list[str]:
        config = Config(self._problem, params_of(self._space, values))
        return [c.name for c in self._space.refusals(config, self._target)]

    def _feasible(self, values: dict[str, Value]) -> bool:
        refusals = self._refusals(values)
        self._refused.update(refusals)
        return not refusals

    def _repair(self, values: dict[str, Value]) -> dict[str, Value] | None:
        """Changes one axis at a time to where fewest constraints refuse, at random among equals; None: got stuck."""
        refusals = len(self._refusals(values))
        for _ in range(_REPAIR_STEPS):
            if not refusals:
                return values
            neighbours = [(a.name, v) for a in self._allowed.axes for v in a.values if v != values[a.name]]
            self._random.shuffle(neighbours)
            if not neighbours:
                return None
            counts = [(len(self._refusals({**values, n: v})), i) for i, (n, v) in enumerate(neighbours)]
            refusals, pick = min(counts)
            name, value = neighbours[pick]
            values[name] = value
        return None

    def _kick(self, values: dict[str, Value]) -> dict[str, Value]:
        """``values`` with one axis drawn anew."""
        axis = self._random.choice([a for a in self._allowed.axes if len(a.values) > 1] or list(self._allowed.axes))
        return {**values, axis.name: self._random.choice(axis.values)}

    def _untried(self, seen: set[Params]) -> dict[str, Value] | None:
        """A feasible point not tried yet, by looking at all of them; None where there is none or too many to look."""
        if self._allowed.size > _ENUMERABLE:
            return None
        left = points_left(self._allowed, self._problem, self._target)
        rest = [v for v in left if params_of(self._space, v) not in seen]
        return self._random.choice(rest) if rest else None

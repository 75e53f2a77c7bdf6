"""How well predictions rank policies of many kinds, and how far live runs leave them."""

from __future__ import annotations

from typing import Any

import numpy as np
import workers
from policies_mixed import mixed_policies
from quality_bench import Bench
from scipy.stats import spearmanr

from kvtune.simulator.quality.calibration import fit_curve


def ranking(bench: Bench) -> dict[str, Any]:
    """How well predictions rank mixed policies, calibrated on selection samples."""
    mixed = mixed_policies(bench.shape[0], bench.shape[1])
    policies = [policy for _, policy in mixed]
    kinds = np.array([kind for kind, _ in mixed])
    lives, guesses = {}, {}
    test_on = bench.first(3, "evaluate")
    for name, group in (("select", bench.first(2, "select")), ("evaluate", test_on)):
        lives[name] = np.array([np.mean(o.kl) for o in bench.run(policies, group)])
        found = bench.crew.everywhere(workers.predicted, group, policies)
        guesses[name] = {
            proxy: np.concatenate([part[proxy] for part in found], 1).mean(1) for proxy in found[0]
        }
    curve = fit_curve(guesses["select"]["probes"], lives["select"])
    predicted, live = guesses["evaluate"]["probes"], lives["evaluate"]
    ratio = live / np.array([curve.value(p) for p in predicted])
    return {
        "policies": len(policies),
        "texts": len(test_on),
        "live_over_predicted_raw_median": float(np.median(live / predicted)),
        "live_over_predicted_median": float(np.median(ratio)),
        "live_over_predicted_p10_p90": [float(x) for x in np.percentile(ratio, [10, 90])],
        "spearman": {
            proxy: by_kind(values, live, kinds) for proxy, values in guesses["evaluate"].items()
        },
        "pairs": [
            [kind, policy.name, float(p), float(t)]
            for kind, policy, p, t in zip(kinds, policies, predicted, live, strict=True)
        ],
    }


def by_kind(predicted: np.ndarray, live: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    """Rank correlation over all policies, those that evict, and those that only quantise."""
    evicting = kinds != "quantised"
    return {
        "all": _spearman(predicted, live),
        "eviction": _spearman(predicted[evicting], live[evicting]),
        "quantisation": _spearman(predicted[~evicting], live[~evicting]),
    }


def _spearman(predicted: np.ndarray, live: np.ndarray) -> float:
    return float(spearmanr(predicted, live).statistic)

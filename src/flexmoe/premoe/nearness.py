"""How far text lies from a task, in deviations of the task's own text.

The distance of a prompt's signature from the task's is Mahalanobis' (as Lee et al., 2018, tell
unknown inputs, arXiv 1807.03888), so that what varies among the task's own prompts counts little,
and what never does counts much. Short prompts vary more than long ones: there is a covariance for
each length. Those between experts are taken half (shrinkage to the diagonal): prompts are few.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOGETHER = 0.5  # of the covariance of two experts that counts


def spread(signature_nE: Tensor, centre_E: Tensor) -> Tensor:
    """The shrunk covariance [E, E] of prompts' signatures around their task's."""
    away_nE = signature_nE - centre_E
    covariance_EE = away_nE.T @ away_nE / len(away_nE)
    own_E = covariance_EE.diagonal()
    own_E = own_E.clamp_min(max(1e-3 * float(own_E.mean()), 1e-12))  # also of what never varied
    return TOGETHER * covariance_EE + (1 - TOGETHER) * own_E.diag()


def distances(signature_nE: Tensor, centre_E: Tensor, spread_EE: Tensor) -> Tensor:
    """Distances [n] from a task whose prompts have this `spread`."""
    root_EE = torch.linalg.cholesky(spread_EE)
    away_En = (signature_nE - centre_E).T
    return torch.linalg.solve_triangular(root_EE, away_En, upper=False).norm(dim=0)

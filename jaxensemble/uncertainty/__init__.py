"""Figures of the stacked outputs of an ensemble: mean, spread, votes, entropies, quantiles, calibration.

Outputs are `[M, N, ...]`, members first. A [`Prediction`][] holds them and every figure is a property of it, computed
when it is asked for, eagerly or under `jax.jit`, in float32 or, for float64 outputs, in float64:

>>> import jax
>>> import jax.numpy as jnp
>>> logits = jnp.log(jnp.array([[[3.0, 1.0], [3.0, 1.0]], [[3.0, 1.0], [1.0, 3.0]]]))  # [members, batch, classes]
>>> prediction = Prediction.from_outputs(logits)
>>> print(prediction.mean.round(2))
[[0.75 0.25]
 [0.5  0.5 ]]
>>> agreed, disputed = jax.jit(lambda p: p.mutual_information)(prediction)
>>> print(f"{agreed:.3f} {disputed:.3f}")
0.000 0.131

Members count equally: the ensemble is their uniform mixture, as in Lakshminarayanan, Pritzel and Blundell (2017),
"Simple and scalable predictive uncertainty estimation using deep ensembles", https://arxiv.org/abs/1612.01474. So
variances divide by M, are 0 for one member, and add up by the law of total variance. (`torch.var` divides by M - 1
without `correction=0`.) Entropies are in nats. NaN outputs give NaN figures; votes,
which are whole numbers, go to the first NaN.
"""

from jaxensemble.uncertainty.calibration import ReliabilityCurve as ReliabilityCurve
from jaxensemble.uncertainty.calibration import brier_score as brier_score
from jaxensemble.uncertainty.calibration import expected_calibration_error as expected_calibration_error
from jaxensemble.uncertainty.calibration import negative_log_likelihood as negative_log_likelihood
from jaxensemble.uncertainty.calibration import reliability_curve as reliability_curve
from jaxensemble.uncertainty.predictions import ClassPrediction as ClassPrediction
from jaxensemble.uncertainty.predictions import GaussianPrediction as GaussianPrediction
from jaxensemble.uncertainty.predictions import Prediction as Prediction
from jaxensemble.uncertainty.predictions import RegressionPrediction as RegressionPrediction

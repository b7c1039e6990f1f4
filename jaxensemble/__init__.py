"""Ensembles of networks as one JAX program."""

from jaxensemble.artifact import verify as verify
from jaxensemble.caches import keep_compiled as keep_compiled
from jaxensemble.ensemble import Ensemble as Ensemble
from jaxensemble.errors import InputError as InputError
from jaxensemble.errors import JaxEnsembleError as JaxEnsembleError
from jaxensemble.errors import MemberError as MemberError
from jaxensemble.errors import NarrowIntegerWarning as NarrowIntegerWarning
from jaxensemble.errors import ParityError as ParityError
from jaxensemble.errors import RandomnessError as RandomnessError
from jaxensemble.errors import StateError as StateError
from jaxensemble.errors import UnsupportedError as UnsupportedError
from jaxensemble.functional import combine_state_for_ensemble as combine_state_for_ensemble
from jaxensemble.functional import functional_call as functional_call
from jaxensemble.functional import stack_module_state as stack_module_state
from jaxensemble.functional import unstack_module_state as unstack_module_state
from jaxensemble.plan import Plan as Plan
from jaxensemble.proof import Proof as Proof
from jaxensemble.state import Constant as Constant
from jaxensemble.training import History as History
from jaxensemble.training import TrainState as TrainState
from jaxensemble.training import fit as fit
from jaxensemble.training import train_step as train_step
from jaxensemble.uncertainty import Prediction as Prediction
from jaxensemble.uncertainty import brier_score as brier_score
from jaxensemble.uncertainty import expected_calibration_error as expected_calibration_error
from jaxensemble.uncertainty import negative_log_likelihood as negative_log_likelihood
from jaxensemble.uncertainty import reliability_curve as reliability_curve
from jaxensemble.vectorize import vmap as vmap
from jaxensemble.version import VERSION as __version__  # noqa: F401

"""The residual streams. This union is the list of them: a new one is a file here and one more
name below.
"""

from typing import Annotated

from tinsmith.core.parse import Kind
from tinsmith.nn.residuals.hyper import Hyper
from tinsmith.nn.residuals.mhyper import MHyper
from tinsmith.nn.residuals.plain import Plain

ResidualConfig = Annotated[Plain | Hyper | MHyper, Kind()]

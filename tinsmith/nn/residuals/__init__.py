"""Union of all residual configs. A new residual is a file here and a name in the union."""

from typing import Annotated

from tinsmith.core.parse import Kind
from tinsmith.nn.residuals.hyper import Hyper
from tinsmith.nn.residuals.mhyper import MHyper
from tinsmith.nn.residuals.plain import Plain

ResidualConfig = Annotated[Plain | Hyper | MHyper, Kind()]

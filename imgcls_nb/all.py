"Every public name of the library, in the order of the chapters. Written by hand: `nbdev-export` leaves it alone."
from imgcls_nb.run import *
from imgcls_nb.task import *
from imgcls_nb.image import *
from imgcls_nb.data import *
from imgcls_nb.label_tools import *
from imgcls_nb.sources import *
from imgcls_nb.check import *
from imgcls_nb.labelling import *
from imgcls_nb.balance import *
from imgcls_nb.augment import *
from imgcls_nb.models import *
from imgcls_nb.transfer import *
from imgcls_nb.train import *
from imgcls_nb.averaging import *
from imgcls_nb.distributed import *
from imgcls_nb.evaluate import *
from imgcls_nb.calibrate import *
from imgcls_nb.compare import *
from imgcls_nb.slices import *
from imgcls_nb.explain import *
from imgcls_nb.runtimes import *
from imgcls_nb.bundle import *
from imgcls_nb.export import *
from imgcls_nb.quantize import *
from imgcls_nb.compress import *
from imgcls_nb.serve import create_app, serve
from imgcls_nb.diagnose import *

"""Programs that run merged checkpoints, and what each of them cannot."""

from moerge.clients.check import Finding as Finding
from moerge.clients.check import check_folder as check_folder
from moerge.clients.check import check_plan as check_plan
from moerge.clients.check import check_result as check_result
from moerge.clients.check import clients as clients
from moerge.clients.result import Result as Result

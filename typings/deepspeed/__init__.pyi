from typing import Any

ops: Any

def initialize(**arguments: Any) -> tuple[Any, Any, Any, Any]: ...

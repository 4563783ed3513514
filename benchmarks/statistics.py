"""Coverage of the intervals, promises of the gate, speed: runs ``simulation.py`` (``--help`` says what it writes).

This file has the name of a module of the standard library, and Python looks beside a script first. So it moves its folder to
the end of the search path before anything else, and gives way where another script of this folder imports ``statistics``.
"""

import sys

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))
    import simulation

    simulation.main()
else:
    import importlib.util
    import sysconfig

    spec = importlib.util.spec_from_file_location(__name__, f"{sysconfig.get_paths()['stdlib']}/statistics.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[__name__] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])

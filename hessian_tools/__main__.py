"""``python -m hessian_tools`` is ``hessian-tools``."""

from hessian_tools.app.cli import main

raise SystemExit(main())

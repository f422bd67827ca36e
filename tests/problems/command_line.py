"""The command line, run in this process."""

from hessian_tools.app import cli


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])

"""The command line: page-primer run | align | warm | status | doctor."""

# SPDX-License-Identifier: Apache-2.0
"""What holds for every recipe, as tests: pytest common/contract. tests/this_recipe.py tells them about this one."""

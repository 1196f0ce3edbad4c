# SPDX-License-Identifier: Apache-2.0
"""What holds for every recipe, as tests: pytest common/contract. Its tests/this_recipe.py says at which size."""

/* A second translation unit sees the declarations only. */
#include "besa.h"
#include "besa.h"

int besa_strict_second(void);
int besa_strict_second(void) { return besa_result_string(BESA_OK) == NULL || besa_dtype_size(BESA_BF16) != 2; }

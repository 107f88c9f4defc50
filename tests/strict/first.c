/* The translation unit with the implementation; twice, since a header may arrive by two ways. The Makefile compiles it
 * as C and as C++, and with other headers before besa.h (-include). */
#define BESA_IMPLEMENTATION
#include "besa.h"
#include "besa.h"

int besa_strict_second(void);

int main(void)
{
    besa_backend be;
    besa_error error;
    int wrong = besa_cpu_backend(&be, NULL, &error) != BESA_OK;
    if (!wrong) be.destroy(&be);
    return wrong || besa_strict_second();
}

// The name under which plain C++ sources ask for CUDA types.
#pragma once

#include "emulator.h"

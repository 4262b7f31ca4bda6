#pragma once  // device.h has the types

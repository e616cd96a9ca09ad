// What the tests expect: failures are printed and counted, and decide the exit status.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

namespace expected {

inline int failures = 0;
// what is under test, for the messages
inline std::string where = "here";

inline void expect(bool good, std::string_view what) {
    if (good) return;
    std::printf("FAILED (%s): %s\n", where.c_str(), std::string(what).c_str());
    ++failures;
}

inline void near(double got, double want, double tolerance, std::string_view what) {
    const bool same = got == want || (std::isnan(got) && std::isnan(want));
    // a message costs more than all else that is done for an entry, under a sanitizer above all
    if (same || std::fabs(got - want) <= tolerance) return;
    expect(false, std::string(what) + ": " + std::to_string(got) + " instead of " +
                      std::to_string(want));
}

inline int status() {
    std::printf(failures ? "%d failures\n" : "all good\n", failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}

}  // namespace expected
